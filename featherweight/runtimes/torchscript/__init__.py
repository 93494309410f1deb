"""TorchScript: encoders and decoders as traced graphs in one file, by `torch.jit`; served without transformers' modules."""
