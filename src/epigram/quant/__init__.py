"""Quantization: which grid, how to round to it, what it cost, and training on it."""
