"""What ONNX Runtime GenAI offers, and how fast it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from featherweight.runtimes.offers import MIB, Offer, Reach
from featherweight.system.device import CPU, Device
from featherweight.system.machine import Machine

_BATCH8 = {True: 0.85, False: 0.50}
"""Share of float32's arithmetic by whether the CPU sums int8 products exactly."""
_PROMPT = {True: 0.72, False: 0.51}
"""The same of a prompt's rows (benchmarks/README.md, SmolLM2-135M: 1.3 and 0.93 times as fast as eager)."""


def offers(device: Device, machine: Machine) -> Iterator[Offer]:
    """Rounded weights have activations rounded per block on a CPU (accuracy level 4)."""
    if device != CPU:
        cuda = Reach(0.5, 0.3, 1e-4)
        yield Offer(cuda, {"precision": "float32"}, numbers="float32", base=700 * MIB, device=device)
        return
    arithmetic, prompt = _BATCH8[machine.int8_dot_product], _PROMPT[machine.int8_dot_product]
    whole = Reach(0.60, 0.50, 1e-5, source="benchmarks/advice.md: onnxruntime-genai float32", prompt=0.70)
    eight = Reach(0.57, arithmetic, 1e-5, source="benchmarks/advice.md: onnxruntime-genai int8", prompt=prompt)
    four = Reach(0.46, arithmetic, 1e-5, source="benchmarks/advice.md: onnxruntime-genai int4", prompt=prompt)
    yield Offer(whole, {"precision": "float32"}, base=140 * MIB)
    int8 = Offer(eight, {"precision": "int8"}, "int8", "int8", numbers="int8", base=120 * MIB, loss=0.001)
    yield int8
    yield replace(int8, grid="int8-g32", head="int8-g32", loss=0.0)
    int4 = replace(int8, reach=four, keys={"precision": "int4"}, grid="int4-g32")
    yield replace(int4, mixed="int8")
    yield int4
