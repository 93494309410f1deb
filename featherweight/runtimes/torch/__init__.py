"""PyTorch: eager, compiled, and with quantized layers."""
