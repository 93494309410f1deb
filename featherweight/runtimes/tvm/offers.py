"""What TVM offers, and how fast it was."""

from __future__ import annotations

from collections.abc import Iterator

from featherweight.runtimes.offers import MIB, Offer, Reach
from featherweight.system.device import CPU, Device

_SEEN = "seen: stories15M on one AVX-512 core, beside eager float32"


def offers(device: Device) -> Iterator[Offer]:
    """Kernels of its own, which compute in float32; weights in floats, or in 8 bits with nothing else rounded."""
    if device == CPU:
        yield Offer(Reach(0.45, 0.40, 1e-4, source=_SEEN), {"precision": "float32"}, base=500 * MIB)
        yield Offer(Reach(0.25, 0.40, 1e-4, source=_SEEN), {"precision": "int8"}, "int8", "int8", base=500 * MIB, loss=0.0005)
