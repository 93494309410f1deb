"""What ONNX Runtime offers of the graphs that Optimum writes."""

from __future__ import annotations

from collections.abc import Iterator

from featherweight.runtimes.offers import MIB, Offer, Reach
from featherweight.system.device import CPU, Device


def offers(device: Device) -> Iterator[Offer]:
    """Fused graphs in float. Nothing on CUDA, where it has never been measured."""
    if device == CPU:
        yield Offer(Reach(0.55, 0.50, 3e-5), {"optimize": "O2"}, base=140 * MIB)
