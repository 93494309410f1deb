"""The roofs of a machine: memory, bandwidth and arithmetic of what a model would be served from.

This machine's CPU is measured, in half a second; a GPU is known by its data sheet, as is a machine that is only described.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import get_args

from featherweight.errors import RecipeError, nearest
from featherweight.recipe.cost import machine_speeds
from featherweight.runtimes.offers import Numbers
from featherweight.system.device import CPU, Device
from featherweight.system.gpu import Capability, Gpu
from featherweight.system.machine import Machine, last_cache_bytes, memory_bandwidth_bytes_s

CACHED = 3.0
"""How much faster weights are read that the last cache holds (stories15M in ONNX Runtime: about 55 GB/s against 20)."""
COUNTED_ON = 64 * 2**20
"""Of a cache that many cores share, no more than this: a model of 142 MB was read from memory beside one of 300 MB."""
USABLE = 0.9
"""The share of a memory that may be filled; vLLM's own default of a GPU's (gpu_memory_utilization)."""


@dataclass(frozen=True)
class Roofs:
    """Of one device: bytes of memory (of each GPU), their number, bytes per second, operations per second by what is multiplied.

    cache_bytes: what is read faster than memory. source: where the speeds come from.
    """

    device: Device
    memory_bytes: float
    bandwidth: float
    flops: Mapping[Numbers, float] = field(default_factory=dict)
    count: int = 1
    cache_bytes: float = 0.0
    source: str = ""

    def read_s(self, size: float, share: float) -> float:
        """Seconds in which so many bytes of weights are read, at a share of the bandwidth."""
        return size / (self.bandwidth * share * (CACHED if size <= self.cache_bytes else 1.0))


@dataclass(frozen=True)
class Sheet:
    """A GPU's data sheet: terabytes per second, teraflops without sparsity, GiB. fp8: 0 where it is computed in 16 bits."""

    bandwidth: float
    float32: float
    float16: float
    int8: float
    fp8: float = 0.0
    gib: float = 80.0
    capability: Capability = (9, 0)


# NVIDIA's data sheets, dense figures.
CARDS: Mapping[str, Sheet] = {
    "B200": Sheet(8.0, 80, 2250, 4500, 4500, gib=180, capability=(10, 0)),
    "H200": Sheet(4.8, 67, 989, 1979, 1979, gib=141, capability=(9, 0)),
    "H100 NVL": Sheet(3.9, 60, 835, 1671, 1671, gib=94, capability=(9, 0)),
    "H100 PCIe": Sheet(2.0, 51, 756, 1513, 1513),
    "H100": Sheet(3.35, 67, 989, 1979, 1979),
    "A100": Sheet(2.0, 19.5, 312, 624, gib=80, capability=(8, 0)),
    "L40S": Sheet(0.864, 91, 362, 733, 733, gib=48, capability=(8, 9)),
    "L4": Sheet(0.3, 30, 121, 242, 242, gib=24, capability=(8, 9)),
    "A10": Sheet(0.6, 31, 125, 250, gib=24, capability=(8, 6)),
    "T4": Sheet(0.32, 8.1, 65, 130, gib=16, capability=(7, 5)),
    "RTX 5090": Sheet(1.79, 105, 210, 838, 419, gib=32, capability=(12, 0)),
    "RTX 4090": Sheet(1.01, 82.6, 165, 661, 330, gib=24, capability=(8, 9)),
    "RTX 3090": Sheet(0.936, 35.6, 71, 284, gib=24, capability=(8, 6)),
}
"""By a part of the card's name, the more particular one first."""
TYPICAL: tuple[tuple[Capability, str], ...] = (
    ((10, 0), "B200"),
    ((9, 0), "H100"),
    ((8, 9), "L4"),
    ((8, 6), "A10"),
    ((8, 0), "A100"),
    ((7, 5), "T4"),
)
"""The card that stands for a compute capability, and for all later ones up to the next."""


def roofs_of(machine: Machine, device: Device, here: bool = True) -> Roofs:
    """Of a machine's CPU, or its GPUs. here: it is this one; a described one has this one's CPU."""
    if device == CPU:
        return _cpu(machine, here)
    gpu = min(machine.gpus, key=lambda one: one.memory_bytes)
    card = card_of(gpu)
    sheet = CARDS[card]
    flops: dict[Numbers, float] = {
        "float32": sheet.float32 * 1e12,
        "float16": sheet.float16 * 1e12,
        "int8": sheet.int8 * 1e12,
        "fp8": (sheet.fp8 or sheet.float16) * 1e12,
    }
    return Roofs(device, gpu.memory_bytes, sheet.bandwidth * 1e12, flops, len(machine.gpus), source=f"data sheet of {card}")


def card_of(gpu: Gpu) -> str:
    """The data sheet that tells most of a GPU: its own, or that of a card of its compute capability."""
    named = next((card for card in CARDS if card.lower() in gpu.name.lower()), None)
    capability = gpu.compute_capability or (8, 0)
    return named or next((card for since, card in TYPICAL if since <= capability), TYPICAL[-1][1])


def _cpu(machine: Machine, here: bool) -> Roofs:
    """What large products of float32 and reading memory reach here; int8 and 16 bits are counted by each engine's share."""
    speeds = machine_speeds()
    bandwidth = max(speeds.bandwidth, memory_bandwidth_bytes_s(budget_s=0.1))  # the former in the thread's own time
    flops: dict[Numbers, float] = dict.fromkeys(get_args(Numbers), speeds.flops)
    cache = min(last_cache_bytes(), COUNTED_ON)
    source = "measured on this machine" if here else "this machine's CPU, as that of the other is not known"
    return Roofs(CPU, machine.memory_bytes, bandwidth, flops, cache_bytes=cache, source=source)


def with_cards(machine: Machine, name: str) -> Machine:
    """`machine` with so many of the GPUs that 'L4' or '2xH100' names, as their data sheet tells. Raises RecipeError."""
    many = re.fullmatch(r"([1-9]\d*)\s*x\s*(.+)", name)
    count, card = (int(many[1]), many[2]) if many else (1, name)
    found = {one.lower(): one for one in CARDS}.get(card.strip().lower())
    if found is None:
        raise RecipeError(f"{name} is no GPU that is known, such as L4 or 2xH100; {nearest(card.strip(), sorted(CARDS))}")
    sheet = CARDS[found]
    return replace(machine, gpus=(Gpu(found, int(sheet.gib * 2**30), sheet.capability),) * count)


def described(
    machine: Machine, gpus: int | None, gpu_gib: float | None, capability: Capability | None, gib: float | None
) -> Machine:
    """`machine` with what is said otherwise: GPUs, their memory and compute capability, its main memory (GiB)."""
    found = machine if gib is None else replace(machine, memory_bytes=int(gib * 2**30))
    if gpus is None and gpu_gib is None and capability is None:
        return found
    known = machine.gpus[0] if machine.gpus else Gpu("", 80 * 2**30, (9, 0))
    capability = capability or known.compute_capability
    memory = known.memory_bytes if gpu_gib is None else int(gpu_gib * 2**30)
    same = known.name if capability == known.compute_capability else ""
    one = Gpu(same or "a GPU", memory, capability)
    return replace(found, gpus=(one,) * (1 if gpus is None else gpus))
