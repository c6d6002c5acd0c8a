"""Tests in a real vLLM engine."""
