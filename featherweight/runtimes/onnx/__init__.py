"""ONNX graphs, as several engines hold them: how weights are packed (pack) and stored (storage), what is read (bytes_read)."""
