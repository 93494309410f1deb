"""OpenVINO: what it serves (runtime), how it is written (write, convert), and the loaded model (loaded, serve).

convert and serve are run by the toolchain's Python.
"""
