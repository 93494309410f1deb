"""What vLLM serves on which NVIDIA GPU, as rules: by compute capability, from Turing (sm_75) to Blackwell (sm_120).

Each rule says from which capability on something runs, is emulated (served, by arithmetic of another format than it is stored in)
or is refused, and by which file of vLLM it was found; none has been run on every one of these GPUs. Prefix caching and tensor
parallelism ask nothing of a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from featherweight.runtimes.spec import ComputeType
from featherweight.system.gpu import Capability, Gpu
from featherweight.system.machine import gpus

VERSION = "0.32.0"
"""Of the vLLM whose source was read; the paths are below its package."""
OLDEST: Capability = (7, 5)
"""CUDA 13, for which torch 2.13 and vLLM's wheel are built, has no code for GPUs before Turing."""
FLASHINFER_HEADS = (64, 128, 256, 512)
"""v1/attention/backends/flashinfer.py, get_supported_head_sizes."""
FP8_CACHE, AWQ, GPTQ, BITSANDBYTES = "fp8 key-value cache", "AWQ checkpoint", "GPTQ checkpoint", "bitsandbytes checkpoint"
Verdict = Literal["runs", "emulated", "refused"]


@dataclass(frozen=True)
class Rule:
    """From `since` on. how: the kernels that serve it, or why there are none. source: files of vLLM, or an issue of it."""

    since: Capability
    verdict: Verdict
    how: str
    source: str


_LINEAR = "model_executor/kernels/linear"
_SCHEMES = "model_executor/layers/quantization/compressed_tensors/schemes"
_METHODS = "model_executor/layers/quantization"
_ATTENTION = "v1/attention/backends"

RULES: dict[ComputeType | str, tuple[Rule, ...]] = {
    "float32": (Rule(OLDEST, "runs", "Triton's attention, the only one in float32", f"{_ATTENTION}/triton_attn.py"),),
    "float16": (Rule(OLDEST, "runs", "every attention", "platforms/cuda.py: supported_dtypes"),),
    "bfloat16": (
        Rule(OLDEST, "refused", "GPUs before Ampere (sm_80) have no bfloat16; take float16", "platforms/cuda.py: supported_dtypes"),
        Rule((8, 0), "runs", "every attention", "platforms/cuda.py: supported_dtypes"),
    ),
    "int8": (
        Rule(OLDEST, "runs", "CUTLASS, int8", f"{_SCHEMES}/compressed_tensors_w8a8_int8.py; {_LINEAR}/scaled_mm/cutlass.py"),
        Rule((10, 0), "runs", "Triton: CUTLASS has no int8 for Blackwell", f"{_LINEAR}/scaled_mm/triton.py; issue 54311"),
    ),
    "w8a16": (
        Rule(OLDEST, "runs", "Marlin", f"{_SCHEMES}/compressed_tensors_wNa16.py; {_LINEAR}/mixed_precision/marlin.py"),
        Rule((9, 0), "runs", "Machete, or Marlin for groups of 32", f"{_LINEAR}/mixed_precision/machete.py"),
        Rule((10, 0), "runs", "Marlin", f"{_LINEAR}/mixed_precision/machete.py: Hopper alone"),
    ),
    "w4a16": (
        Rule(OLDEST, "runs", "Marlin", f"{_SCHEMES}/compressed_tensors_wNa16.py; {_LINEAR}/mixed_precision/marlin.py"),
        Rule((9, 0), "runs", "Machete, or Marlin for groups of 32", f"{_LINEAR}/mixed_precision/machete.py"),
        Rule((10, 0), "runs", "Marlin", f"{_LINEAR}/mixed_precision/machete.py: Hopper alone"),
    ),
    "fp8": (
        Rule(
            OLDEST,
            "emulated",
            "weights in fp8, activations in 16 bits (Marlin, Humming): the size of fp8 without its speed",
            f"{_SCHEMES}/compressed_tensors_w8a16_fp8.py; {_LINEAR}/scaled_mm/marlin.py",
        ),
        Rule((8, 9), "runs", "CUTLASS, fp8 by fp8", f"{_SCHEMES}/compressed_tensors_w8a8_fp8.py; {_LINEAR}/scaled_mm/cutlass.py"),
    ),
    FP8_CACHE: (
        Rule(
            OLDEST,
            "refused",
            "no attention reads a cache in fp8 before Ampere (sm_80); leave kv_cache out",
            f"{_ATTENTION}/triton_attn.py; {_ATTENTION}/flashinfer.py: supports_compute_capability",
        ),
        Rule(
            (8, 0),
            "emulated",
            "FlashInfer, in 16 bits, and for heads of 64, 128, 256 or 512 alone",
            f"{_ATTENTION}/flashinfer.py; {_ATTENTION}/triton_attn.py: SM89+",
        ),
        Rule((8, 9), "runs", "FlashInfer or Triton", f"{_ATTENTION}/triton_attn.py"),
        Rule((9, 0), "runs", "FlashAttention 3", f"{_ATTENTION}/fa_utils.py: flash_attn_supports_kv_cache_dtype"),
        Rule((10, 0), "runs", "FlashInfer or FlashAttention 4", f"{_ATTENTION}/fa_utils.py; platforms/cuda.py"),
        Rule((12, 0), "runs", "FlashInfer or Triton", "platforms/cuda.py: _get_backend_priorities"),
    ),
    AWQ: (Rule(OLDEST, "runs", "Marlin", f"{_METHODS}/auto_awq.py"),),
    GPTQ: (Rule(OLDEST, "runs", "Marlin", f"{_METHODS}/auto_gptq.py; {_LINEAR}/mixed_precision/marlin.py"),),
    BITSANDBYTES: (
        Rule(
            OLDEST,
            "refused",
            f"vLLM {VERSION} reads none; serve nf4 and llm.int8 by torch",
            f"{_METHODS}/__init__.py: QuantizationMethods",
        ),
    ),
}
"""By compute type, by what is kept in the cache, and by the format of a checkpoint that others made."""


def rule(what: ComputeType | str, capability: Capability) -> Rule:
    """The rule for something on a GPU."""
    if capability < OLDEST:
        return Rule((0, 0), "refused", "torch and vLLM for CUDA 13 run on Turing (sm_75) and later", "CUDA 13's release notes")
    return [one for one in RULES[what] if one.since <= capability][-1]


def refusal(compute_type: ComputeType, kv_cache: str | None, there: Sequence[Gpu]) -> str | None:
    """Why vLLM does not serve it on GPUs of which the oldest decides; None where it does, or where none tells its capability."""
    capability = oldest(there)
    if capability is None:
        return None
    for what in (compute_type, *([FP8_CACHE] if kv_cache else [])):
        found = rule(what, capability)
        if found.verdict == "refused":
            return f"vLLM serves no {what} on sm_{capability[0]}{capability[1]}: {found.how}"
    return None


def heads_refusal(width: int, there: Sequence[Gpu] | None = None) -> str | None:
    """Why heads of `width` channels have no fp8 cache on GPUs, those here by default: where FlashInfer alone reads it."""
    capability = oldest(gpus() if there is None else there)
    if capability is None or rule(FP8_CACHE, capability).verdict != "emulated" or width in FLASHINFER_HEADS:
        return None
    return (
        f"before sm_89 vLLM's fp8 cache wants heads of {', '.join(map(str, FLASHINFER_HEADS))} channels, and these have {width}; "
        "leave kv_cache out"
    )


def emulated(there: Sequence[Gpu]) -> dict[str, str]:
    """What is served there by other arithmetic than it is stored in, and how."""
    capability = oldest(there)
    found = {} if capability is None else {str(what): rule(what, capability) for what in RULES}
    return {what: one.how for what, one in found.items() if one.verdict == "emulated"}


def disabled_kernels(compute_type: str | None, there: Sequence[Gpu]) -> str:
    """What VLLM_DISABLED_KERNELS has to name: CUTLASS takes int8 on Blackwell and fails, Triton behind it works (issue 54311)."""
    capability = oldest(there)
    blackwell = capability is not None and capability >= (10, 0)
    return "CutlassInt8ScaledMMLinearKernel" if blackwell and compute_type == "int8" else ""


def oldest(there: Sequence[Gpu]) -> Capability | None:
    """The capability that all of them have; None where it is not known."""
    return min((gpu.compute_capability for gpu in there if gpu.compute_capability), default=None)
