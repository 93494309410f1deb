"""What CTranslate2 offers, and how fast it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from featherweight.runtimes.offers import MIB, Offer, Reach
from featherweight.system.device import CPU, Device
from featherweight.system.machine import Machine

AMPERE = (8, 0)
"""The first compute capability with bfloat16 (CTranslate2's guide, Quantization: bfloat16 wants 8.0)."""
_FLOAT = Reach(0.55, 0.33, 2e-5, source="benchmarks/advice.md: ctranslate2 float32", prompt=0.55)
_INT8 = Reach(0.44, 0.87, 2e-5, source="benchmarks/advice.md: ctranslate2 int8 with VNNI", prompt=1.27)
_SATURATING = Reach(0.18, 0.70, 2e-5, source="benchmarks/advice.md: ctranslate2 int8 on AVX2")
_CUDA = Reach(0.60, 0.40, 2.2e-4, source="benchmarks/gpu.md: CTranslate2 float16, its layers; shares of the roofs assumed")


def offers(device: Device, machine: Machine) -> Iterator[Offer]:
    """int8 rounds activations too; where the head stays in float it would be rounded at load, so that it is quantized as well."""
    if device == CPU:
        base = 75 * MIB
        int8 = _INT8 if machine.int8_dot_product else _SATURATING
        loss = 0.0025 if machine.int8_dot_product else 0.01
        yield Offer(_FLOAT, {"compute_type": "float32"}, base=base)
        yield Offer(int8, {"compute_type": "int8"}, "int8", "int8", numbers="int8", base=base, loss=loss)
        return
    half = Offer(_CUDA, {"compute_type": "float16"}, numbers="float16", width=2, cache=2, base=650 * MIB, device=device)
    yield half
    yield replace(half, keys={"compute_type": "int8_float16"}, grid="int8", head="int8", numbers="int8", loss=0.0025)
    if all((gpu.compute_capability or AMPERE) >= AMPERE for gpu in machine.gpus):
        yield replace(half, keys={"compute_type": "bfloat16"}, loss=0.0005)
        yield replace(half, keys={"compute_type": "int8_bfloat16"}, grid="int8", head="int8", numbers="int8", loss=0.003)
