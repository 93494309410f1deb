"""TVM's own library: its packages lie in a toolchain, and are joined to this environment's in the processes that need them.

Its wheel needs nothing but numpy, ml-dtypes and typing-extensions, and its lock file takes them at this environment's versions.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from featherweight.system import toolchains

TOOLCHAIN = "tvm"
VECTORS = {"x86-64-v4": 64, "x86-64-v3": 16}
"""Outputs in a panel of packed weights: as many as six rows of them have room for in the registers of a level of x86-64."""


def width(made_for: str) -> int:
    """Outputs in a panel of packed weights."""
    return VECTORS.get(made_for, 16)


def opened(threads: int = 1, *, compiler: bool = False) -> Any:
    """The module `tvm`, imported in this process; without its compiler it is the 5 MB that serve.

    Raises ToolchainError where it is not installed.
    """
    toolchains.join(TOOLCHAIN)
    # Threads that are bound to cores would wait for who else computes there.
    os.environ |= {"TVM_NUM_THREADS": str(threads), "TVM_BIND_THREADS": "0"}
    os.environ["TVM_USE_RUNTIME_LIB"] = "0" if compiler else "1"
    return import_module("tvm")
