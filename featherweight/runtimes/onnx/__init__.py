"""ONNX graphs, as several engines hold them: what they read from memory (bytes_read)."""
