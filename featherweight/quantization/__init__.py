"""Quantization: a file a method."""
