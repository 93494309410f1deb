"""vLLM: what it serves (runtime), how a folder is written (write, pack), and the loaded model (loaded)."""
