"""What ONNX Runtime offers of the graphs that Optimum writes."""

from __future__ import annotations

from collections.abc import Iterator

from featherweight.runtimes.offers import MIB, Offer, Reach
from featherweight.system.device import CPU, Device


def offers(device: Device) -> Iterator[Offer]:
    """Fused graphs in float; float16 on CUDA."""
    if device == CPU:
        yield Offer(Reach(0.55, 0.50, 3e-5), {"optimize": "O2"}, base=140 * MIB)
        return
    yield Offer(Reach(0.5, 0.3, 1e-4), {"optimize": "O4"}, numbers="float16", width=2, cache=4, base=700 * MIB, device=device)
