"""PyTorch: eager and compiled (runtime), and with quantized layers, torch's own and torchao's (quantized_runtime)."""
