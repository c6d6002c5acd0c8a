"""Adapters to training engines: thin, version-gated, without maths."""
