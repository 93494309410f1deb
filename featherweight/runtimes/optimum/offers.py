"""What ONNX Runtime offers of the graphs that Optimum writes."""

from __future__ import annotations

from collections.abc import Iterator

from featherweight.runtimes.offers import MIB, Offer, Reach
from featherweight.system.device import CPU, Device


def offers(device: Device) -> Iterator[Offer]:
    """Fused graphs in float. Nothing on CUDA, where it has never been measured."""
    if device == CPU:
        reach = Reach(0.43, 0.65, 3e-5, source="benchmarks/advice.md: onnxruntime float32")
        yield Offer(reach, {"optimize": "O2"}, base=140 * MIB)
