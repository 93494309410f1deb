"""What AOTInductor offers, and how fast it was."""

from __future__ import annotations

from collections.abc import Iterator

from featherweight.runtimes.offers import MIB, Offer, Reach
from featherweight.system.device import CPU, Device


def offers(device: Device) -> Iterator[Offer]:
    """In float32, its weights twice: as they are for whole texts, packed for single steps."""
    if device == CPU:
        reach = Reach(0.60, 0.28, 1e-4, source="seen: stories15M on one AVX-512 core, beside eager float32", prompt=0.55)
        yield Offer(reach, base=600 * MIB)
