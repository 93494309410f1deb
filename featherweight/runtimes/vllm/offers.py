"""What vLLM offers, and how fast it was; on a GPU by assumption, since it has not been measured there here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from featherweight.runtimes.offers import MIB, Offer, Reach
from featherweight.runtimes.torch.offers import NATIVE_16_BITS
from featherweight.system.device import CPU, Device
from featherweight.system.machine import Machine

_CPU = Reach(0.47, 0.30, 1e-4, 2e-3, "benchmarks/advice.md: vllm float32")
_CUDA = Reach(0.75, 0.50, 2.5e-5, 1.5e-3, "assumed: CUDA graphs take the launches of kernels away")


def offers(device: Device, machine: Machine) -> Iterator[Offer]:
    """Embedding and head stay in float. On GPUs also over several, two, four and eight."""
    if device == CPU:
        yield from _on_cpu(machine)
        return
    sizes = [size for size in (1, 2, 4, 8) if size <= max(1, len(machine.gpus))]
    for offer in _on_gpu(device):
        yield from (_shared(offer, size) for size in sizes)


def _on_cpu(machine: Machine) -> Iterator[Offer]:
    whole = Offer(_CPU, {"compute_type": "float32"}, base=1600 * MIB, batching="continuous")
    yield whole
    if machine.cpu_features & NATIVE_16_BITS:
        yield replace(
            whole, keys={"compute_type": "bfloat16"}, width=2, cache=2, loss=0.0005, reach=replace(_CPU, source="assumed")
        )
    fast = machine.int8_dot_product
    w8a8 = Reach(0.35, 0.60, 1e-4, 2e-3, "docs/methods.md: W8A8 with VNNI") if fast else Reach(0.03, 0.15, 1e-4, 2e-3)
    yield replace(whole, keys={"compute_type": "int8"}, grid="int8", numbers="int8", reach=w8a8, loss=0.001)
    w4a16 = Reach(0.20, 0.30, 1e-4, 2e-3, "docs/methods.md: W4A16")
    yield replace(whole, keys={"compute_type": "w4a16"}, grid="int4-g32", reach=w4a16, scale=2)
    fp8 = Reach(0.02, 0.02, 1e-4, 2e-3, "docs/methods.md: FP8, a CPU has no float8 product")
    yield replace(whole, keys={"compute_type": "fp8"}, grid="fp8", reach=fp8, loss=0.0015)


def _on_gpu(device: Device) -> Iterator[Offer]:
    half = Offer(
        _CUDA,
        {"compute_type": "float16"},
        numbers="float16",
        width=2,
        cache=2,
        scale=2,
        base=2000 * MIB,
        device=device,
        batching="continuous",
    )
    yield half
    yield replace(half, keys={"compute_type": "bfloat16"}, loss=0.0005)
    yield replace(half, keys={"compute_type": "int8"}, grid="int8", numbers="int8", loss=0.001)
    yield replace(half, keys={"compute_type": "fp8"}, grid="fp8", numbers="fp8", loss=0.0015)
    yield replace(half, keys={"compute_type": "w8a16"}, grid="int8")
    marlin = replace(_CUDA, memory=0.60, source="assumed of Marlin's kernels")
    yield replace(half, keys={"compute_type": "w4a16"}, grid="int4-g32", reach=marlin)


def _shared(offer: Offer, size: int) -> Offer:
    """Over several GPUs two sums per layer go from each to all: a few tens of microseconds each, by assumption."""
    if size == 1:
        return offer
    reach = replace(offer.reach, layer_s=offer.reach.layer_s + 4e-5)
    return replace(offer, keys={**offer.keys, "tensor_parallel_size": size}, parts=size, reach=reach)
