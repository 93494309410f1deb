"""What OpenVINO offers, and how fast it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from featherweight.runtimes.offers import MIB, Offer, Reach
from featherweight.system.device import CPU, Device
from featherweight.system.machine import Machine

_FLOAT = Reach(0.55, 0.42, 3e-5, source="benchmarks/advice.md: openvino float32")
_INT8 = Reach(0.40, 0.47, 3e-5, source="benchmarks/README.md: SmolLM2-135M-Instruct, OpenVINO int8", prompt=1.1)
_INT4 = Reach(0.31, 0.50, 3e-5, source="benchmarks/README.md: SmolLM2-135M-Instruct, OpenVINO int4", prompt=1.2)
_SLOW = Reach(0.39, 0.28, 3e-5, source="benchmarks/README.md: SmolLM2-135M on a CPU without AVX-512")
_SLOW_INT4 = replace(_SLOW, memory=0.31, source="assumed: as int8 without VNNI, bytes as with it")


def offers(device: Device, machine: Machine) -> Iterator[Offer]:
    """Graphs in float, and in integers with activations rounded at run time. It serves from CPUs alone here."""
    if device != CPU:
        return
    eight, four = (_INT8, _INT4) if machine.int8_dot_product else (_SLOW, _SLOW_INT4)
    yield Offer(_FLOAT, {"precision": "float32"}, base=160 * MIB)
    int8 = Offer(eight, {"precision": "int8"}, "int8", "int8", numbers="int8", base=160 * MIB, loss=0.002)
    yield int8
    yield replace(int8, reach=four, keys={"precision": "int4"}, grid="int4-g32")
