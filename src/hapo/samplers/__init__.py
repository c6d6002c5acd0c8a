"""The adaptive temperature inside generation engines, one file an engine, each engine unmodified."""
