"""TVM's own library: its packages lie in a toolchain, and are joined to this environment's in the processes that need them.

Its wheel needs nothing but numpy, ml-dtypes and typing-extensions, and its lock file takes them at this environment's versions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from featherweight.errors import StageError
from featherweight.system import toolchains
from featherweight.system.machine import Machine

TOOLCHAIN = "tvm"
LEVELS: Mapping[str, frozenset[str]] = {
    "x86-64-v4": frozenset({"avx512f", "avx512bw", "avx512vl"}),
    "x86-64-v3": frozenset({"avx2", "fma"}),
}
"""Levels of x86-64 that code is made for, and what a CPU has of each; the best first."""
VECTORS = {"x86-64-v4": 64, "x86-64-v3": 16}
"""Outputs in a panel of packed weights: as many as six rows of them have room for in the level's registers."""


def level(machine: Machine) -> str:
    """What code is made for on that machine; 'generic' for a CPU that is none of x86-64 from AVX2 on."""
    return next((name for name, features in LEVELS.items() if features <= machine.cpu_features), "generic")


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


def require(made_for: str, machine: Machine) -> None:
    """Raise StageError where this CPU lacks what the code was made for: it would end the process without a word."""
    if lacking := sorted(LEVELS.get(made_for, frozenset()) - machine.cpu_features):
        raise StageError(
            f"this library was compiled for {made_for}, and the CPU here has no {lacking[0]}; optimize the model on this machine"
        )
