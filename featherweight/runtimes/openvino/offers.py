"""What OpenVINO offers, and how fast it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from featherweight.runtimes.offers import MIB, Offer, Reach
from featherweight.system.device import CPU, Device


def offers(device: Device) -> Iterator[Offer]:
    """Graphs in float, and in integers with activations rounded at run time. It serves from CPUs alone here."""
    if device != CPU:
        return
    yield Offer(Reach(0.45, 0.6, 3e-5), {"precision": "float32"}, base=160 * MIB)
    int8 = Offer(Reach(0.4, 0.6, 3e-5), {"precision": "int8"}, "int8", "int8", numbers="int8", base=160 * MIB, loss=0.002)
    yield int8
    yield replace(int8, keys={"precision": "int4"}, grid="int4-g32")
