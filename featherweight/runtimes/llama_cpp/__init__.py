"""llama.cpp: what it serves (runtime, refusals), what its graphs are (architectures), how a GGUF file is written (write, keys,
shapes, tensors, blocks, own_kinds, vocabulary), its C functions (library), and the loaded model (loaded).
"""
