"""What TorchScript offers, and how fast it was."""

from __future__ import annotations

from collections.abc import Iterator

from featherweight.runtimes.offers import MIB, Offer, Reach
from featherweight.system.device import CPU, Device


def offers(device: Device) -> Iterator[Offer]:
    """In float32, its weights twice (a decoder's, as they are and packed); in int8 the layers of torch-dynamic."""
    if device == CPU:
        reach = Reach(0.50, 0.26, 3e-4, source="the traced graphs of stories15M, beside eager float32 on one AVX2 core")
        yield Offer(reach, base=560 * MIB)
