"""ONNX Runtime through Optimum: what it serves (runtime), how it is written (write, build, mends), the loaded model (loaded)."""
