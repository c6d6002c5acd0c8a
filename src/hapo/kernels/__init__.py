"""Triton kernels. Importing their modules needs triton; the torch paths that they replace agree to rounding."""
