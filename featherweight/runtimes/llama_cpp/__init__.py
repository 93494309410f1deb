"""llama.cpp: what it serves (runtime), how a GGUF file is written (write, architectures, blocks, vocabulary), its C functions
(library), and the loaded model (loaded).
"""
