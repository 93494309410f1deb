"""PyTorch itself, declared: eager, which is the baseline, and compiled by Inductor."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT, HALF, INT8_ACTIVATIONS, Bound, sixteen_bits
from featherweight.runtimes.interface import Grids, Runtime
from featherweight.runtimes.known_models import Otherwise, otherwise_refusal
from featherweight.runtimes.refusals import (
    cache_refusal,
    compiler_refusal,
    compute_type_refusal,
    float_of_rounded_refusal,
    gpu_refusal,
    keys_and_values_refusal,
    on_cpu_refusal,
    rotary_length_refusal,
)
from featherweight.runtimes.spec import FLOATS, SIXTEEN_BITS, CompileSpec, ComputeType, ExportSpec
from featherweight.spec import Task
from featherweight.store.served_folder import Serving
from featherweight.system.device import CPU, CUDA, Device
from featherweight.system.machine import Machine

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from featherweight.runtimes.bytes_read import HeldTensor
    from featherweight.runtimes.candidate import Candidate
    from featherweight.runtimes.offers import Offer
    from featherweight.runtimes.writing import Source

BITSANDBYTES: tuple[ComputeType, ...] = ("nf4", "llm.int8")


class TorchSpec(ExportSpec):
    """compute_type: the three floats, or bitsandbytes' nf4 and llm.int8, which round at load and compute on CUDA."""

    engine: Literal["torch"]
    compute_type: ComputeType = "float32"


class Torch(Runtime[TorchSpec]):
    """The checkpoint's own folder in transformers' own modules: in float32 what all others are compared with."""

    name = "torch"
    devices = (CPU, CUDA)
    spec = TorchSpec
    loads_with = "featherweight.runtimes.torch.eager:TorchModel"
    modules = ("torch",)
    libraries = ("torch", "transformers", "bitsandbytes")
    requirements = ("torch",)
    streams = True

    def write(self, spec: TorchSpec, source: Source, out: Path) -> None:
        if spec.compute_type not in BITSANDBYTES:
            _write_floats(self.name, spec.compute_type, source, out)
            return
        from featherweight.checkpoint.saving import link_checkpoint
        from featherweight.runtimes.torch import bitsandbytes

        link_checkpoint(source.checkpoint, out)
        source.may_stream = False  # it changes the model where it is
        bitsandbytes.move_to_grid(source.model, spec.compute_type)
        Serving(self.name, options={"bitsandbytes": spec.compute_type}).write(out)

    def check(self, spec: TorchSpec, source: Source, served: Path) -> Metrics:
        """In float32 on the CPU it is the reference itself, so that there is nothing to compare."""
        itself = spec.compute_type == "float32" and source.device == CPU
        return {} if itself else super().check(spec, source, served)

    def bound(self, serving: Serving) -> Bound:
        """float16: 0.025 nats at most, bfloat16 0.26 and 0.019 on average; nf4 computes in float16, llm.int8 with int8 activations.

        Of bitsandbytes what is compared has the weights that it rounds to: what they cost is a matter of quality.
        """
        rounded = {"nf4": HALF, "llm.int8": INT8_ACTIVATIONS}.get(serving.options.get("bitsandbytes", ""))
        return rounded or sixteen_bits(serving.options.get("dtype", "")) or EXACT

    def held_tensors(self, folder: Path, serving: Serving, config: PreTrainedConfig) -> Iterator[HeldTensor]:
        if rounded := serving.options.get("bitsandbytes"):
            from featherweight.runtimes.torch.bytes_read import bitsandbytes_tensors

            return bitsandbytes_tensors(folder, rounded, config)
        return super().held_tensors(folder, serving, config)

    def offers(self, device: Device, machine: Machine) -> Iterator[Offer]:
        from featherweight.runtimes.torch.offers import eager

        return eager(device, machine)

    def grid_refusal(self, grids: Grids, spec: TorchSpec) -> str | None:
        known = (*FLOATS, *BITSANDBYTES)
        if reason := compute_type_refusal(self.name, known, spec.compute_type) or cache_refusal(self.name, spec):
            return reason
        if grids.body is None:
            return None
        if spec.compute_type in BITSANDBYTES:
            return f"bitsandbytes rounds weights to {spec.compute_type} itself; give it float ones"
        return float_of_rounded_refusal(spec.compute_type)

    def adapters_refusal(self, spec: TorchSpec) -> str | None:
        if spec.compute_type in BITSANDBYTES:
            return f"adapters beside {spec.compute_type} weights were never held to anything; take float32"
        return None

    def machine_refusal(self, spec: TorchSpec, machine: Machine) -> str | None:
        if spec.compute_type not in BITSANDBYTES:
            return None
        if not machine.gpus:
            return gpu_refusal(self.name, spec.compute_type)
        missing = find_spec("bitsandbytes") is None
        return f"{spec.compute_type} needs bitsandbytes, which is not installed; pip install bitsandbytes" if missing else None

    def device_refusal(self, spec: TorchSpec, device: Device, machine: Machine) -> str | None:
        if spec.compute_type in BITSANDBYTES and device == CPU:
            return on_cpu_refusal(self.name, spec.compute_type)
        return super().device_refusal(spec, device, machine)


def _write_floats(engine: str, numbers: str, source: Source, out: Path) -> None:
    """The checkpoint as it is, or rounded to a float of 16 bits."""
    from featherweight.checkpoint.saving import link_checkpoint

    if numbers in SIXTEEN_BITS:
        source.save_rounded(numbers, out)
        Serving(engine, options={"dtype": numbers}).write(out)
    else:
        link_checkpoint(source.checkpoint, out)
        Serving(engine).write(out)


_NO_GRAPH = {
    "keeps what it has read in a cache of its own": ("deepseek_v4", "inkling_text", "minimax"),
    "counts on the host what it has read": ("mpt", "trocr", "xglm"),
    "asks each text which experts it needs": ("longcat_flash",),
    "pads each text to whole blocks, and warns of it": ("big_bird", "longformer"),
}
"""Why the step, or pass, of these model types is none that Dynamo traces as one (torch 2.13, transformers 5.17)."""
KNOWN = {
    kind: Otherwise(f"torch.compile makes no whole graph of transformers' {{kind}}: it {why}; take another engine")
    for why, kinds in _NO_GRAPH.items()
    for kind in kinds
} | {
    "gpt_neo": Otherwise(
        "torch.compile's step of transformers' {kind} writes other tokens: it takes the length of its cache, which stays the same, "
        "for that of the text; take another engine"
    )
}


class TorchCompileSpec(CompileSpec):
    """precision: one of the three floats; integers are other engines'."""

    engine: Literal["torch-compile"]
    precision: Literal["float32", "bfloat16", "float16", "int8", "int4"] = "float32"


class TorchCompile(Runtime[TorchCompileSpec]):
    """The checkpoint's own folder, its decode step (an encoder's one pass) compiled when the model is loaded."""

    name = "torch-compile"
    devices = (CPU, CUDA)
    spec = TorchCompileSpec
    loads_with = "featherweight.runtimes.torch.compiled:CompiledTorchModel"
    modules = ("torch",)
    libraries = ("torch", "transformers")
    requirements = ("torch",)
    writing_s = 6
    slow_to_switch = True

    def write(self, spec: TorchCompileSpec, source: Source, out: Path) -> None:
        _write_floats(self.name, spec.precision, source, out)

    def bound(self, serving: Serving) -> Bound:
        return sixteen_bits(serving.options.get("dtype", "")) or EXACT

    def offers(self, device: Device, machine: Machine) -> Iterator[Offer]:
        from featherweight.runtimes.torch.offers import compiled

        return compiled(device, machine)

    def task_refusal(self, task: Task) -> str | None:
        return "only decoders have a compiled step here; take another engine" if task == "text2text-generation" else None

    def grid_refusal(self, grids: Grids, spec: TorchCompileSpec) -> str | None:
        if spec.precision not in FLOATS:
            return f"torch.compile serves {', '.join(FLOATS)} here, not {spec.precision}; take another engine"
        return None if grids.body is None else float_of_rounded_refusal(spec.precision)

    def model_refusal(self, spec: TorchCompileSpec, model: Candidate) -> str | None:
        """Other caches; and rotary embeddings that ask for the length at every step, which a graph of one shape cannot."""
        return (
            otherwise_refusal(KNOWN, model.facts.model_type, model.config)
            or keys_and_values_refusal("torch.compile", model.config)
            or rotary_length_refusal("torch.compile", model.config)
        )

    def missing(self) -> str | None:
        """Inductor writes C++ and needs a compiler for it."""
        return super().missing() or compiler_refusal("torch.compile")


TORCH, TORCH_COMPILE = Torch(), TorchCompile()
