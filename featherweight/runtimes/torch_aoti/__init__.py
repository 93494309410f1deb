"""AOTInductor: encoders and decoders compiled ahead of time, by torch.export and Inductor; no compiler where it serves."""
