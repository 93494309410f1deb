"""What TorchScript offers, and how fast it was."""

from __future__ import annotations

from collections.abc import Iterator

from featherweight.runtimes.offers import MIB, Offer, Reach
from featherweight.runtimes.torch.offers import ROUNDED_LOSS
from featherweight.system.device import CPU, Device
from featherweight.system.machine import Machine

_FLOAT = Reach(0.50, 0.18, 3e-4, source="the traced graphs of stories15M, beside eager float32 on one AVX2 core", prompt=0.58)
_INT8 = Reach(0.24, 0.70, 2e-4, source="benchmarks/advice.md: torchscript int8")


def offers(device: Device, machine: Machine) -> Iterator[Offer]:
    """In float32, its weights twice (a decoder's, as they are and packed); in int8 the layers of torch-dynamic."""
    if device == CPU:
        yield Offer(_FLOAT, {"precision": "float32"}, base=560 * MIB)
        loss = ROUNDED_LOSS[machine.int8_dot_product]
        yield Offer(_INT8, {"precision": "int8"}, "int8", "int8", numbers="int8", base=420 * MIB, loss=loss)
