"""What PyTorch offers, eager, compiled and with quantized layers, and how fast it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from featherweight.runtimes.offers import MIB, Offer, Reach
from featherweight.runtimes.torch.formats import FORMATS
from featherweight.system.device import CPU, Device
from featherweight.system.machine import Machine

NATIVE_16_BITS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Features of CPUs that multiply in bfloat16; the others turn every number into float32 first, and are slower for it."""
ROUNDED_LOSS = {True: 0.002, False: 0.0075}
"""What one range for all activations of a product costs; it has 7 bits where the CPU does not sum 8-bit products exactly."""
_EAGER = Reach(0.45, 0.12, 5e-4, source="benchmarks/advice.md: torch float32", prompt=0.55)
_EAGER_CUDA = Reach(0.60, 0.40, 1.05e-3, source="benchmarks/gpu.md: eager float32, its layers; shares of the roofs assumed")
_DYNAMIC = Reach(0.21, 0.60, 5e-4, source="benchmarks/advice.md: torch-dynamic")
_UNPACKING = Reach(0.20, 0.20, 7e-4, source="assumed: every weight becomes a float before it is multiplied")


def eager(device: Device, machine: Machine) -> Iterator[Offer]:
    """In float32 the baseline of every comparison."""
    if device == CPU:
        yield Offer(_EAGER, {"compute_type": "float32"}, base=540 * MIB)
        if machine.cpu_features & NATIVE_16_BITS:
            reach = replace(_EAGER, source="assumed: as float32, at half of the bytes")
            yield Offer(reach, {"compute_type": "bfloat16"}, width=2, cache=2, base=540 * MIB, loss=0.0005)
        return
    yield Offer(_EAGER_CUDA, {"compute_type": "float32"}, base=1500 * MIB, device=device)
    half = Offer(_EAGER_CUDA, {"compute_type": "float16"}, numbers="float16", width=2, cache=2, base=1500 * MIB, device=device)
    yield half
    yield replace(half, keys={"compute_type": "bfloat16"}, loss=0.0005)
    four = replace(half, keys={"compute_type": "nf4"}, reach=replace(_UNPACKING, layer_s=1.5e-3))
    yield replace(four, body_bytes=0.5625, loss=0.02)
    yield replace(four, keys={"compute_type": "llm.int8"}, body_bytes=1, loss=0.002)


def compiled(device: Device, machine: Machine) -> Iterator[Offer]:
    """Today's compiled step is hardly faster than eager."""
    reach = _EAGER if device == CPU else replace(_EAGER_CUDA, layer_s=4e-4, source="assumed")
    source = "benchmarks/README.md: stories15m, inductor"
    yield Offer(replace(reach, layer_s=0.95 * reach.layer_s, source=source), base=850 * MIB, device=device)


def quantized(name: str, device: Device, machine: Machine) -> Iterator[Offer]:
    """int8 rows with rounded activations by torch's own kernel, or weights alone in integers, which are unpacked to multiply."""
    form = FORMATS[name]
    grid = "int4-g32" if form.body.startswith("int4") else "int8"
    rounded = form.activations != "float"
    reach = _DYNAMIC if rounded and device == CPU else replace(_UNPACKING, layer_s=1.5e-3 if device != CPU else 7e-4)
    one_range = ROUNDED_LOSS[machine.int8_dot_product] if name == "torch-dynamic" else 0.002
    loss = {"float": 0.0, "static": 0.05}.get(form.activations, one_range)
    held = Offer(reach, {}, grid, "int8", numbers="int8" if rounded else "float32", base=560 * MIB, loss=loss, device=device)
    yield held if form.vocabulary else replace(held, body_bytes=1.0, head_bytes=4.0)
