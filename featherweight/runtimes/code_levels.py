"""For which CPUs compiled code is made, and that it is loaded on no other."""

from __future__ import annotations

from collections.abc import Mapping

from featherweight.errors import StageError
from featherweight.system.machine import Machine

LEVELS: Mapping[str, frozenset[str]] = {
    "x86-64-v4": frozenset({"avx512f", "avx512bw", "avx512vl"}),
    "x86-64-v3": frozenset({"avx2", "fma"}),
}
"""Levels of x86-64 that code is made for, and what a CPU has of each; the best first."""
GENERIC = "generic"


def level(machine: Machine) -> str:
    """What code is made for on that machine; GENERIC for a CPU that is none of x86-64 from AVX2 on."""
    return next((name for name, features in LEVELS.items() if features <= machine.cpu_features), GENERIC)


def require(made_for: str, machine: Machine) -> None:
    """Raise StageError where this CPU lacks what the code was made for: it would end the process without a word."""
    if lacking := sorted(LEVELS.get(made_for, frozenset()) - machine.cpu_features):
        raise StageError(
            f"this library was compiled for {made_for}, and the CPU here has no {lacking[0]}; optimize the model on this machine"
        )
