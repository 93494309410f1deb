"""Apache TVM, declared: encoders and decoders in float32 or with weights of 8 bits, compiled for this machine's kind of CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from featherweight.model.architecture import attention_cap
from featherweight.model.positions import sliding_window
from featherweight.runtimes.interface import Grids, Runtime
from featherweight.runtimes.refusals import (
    answers_refusal,
    both_stacks_refusal,
    compiler_refusal,
    float_of_rounded_refusal,
    rotary_length_refusal,
    rows_of_8_bits_refusal,
)
from featherweight.runtimes.spec import CompileSpec
from featherweight.spec import Task
from featherweight.store.served_folder import Serving
from featherweight.system.device import Device
from featherweight.system.machine import Machine

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from featherweight.runtimes.bytes_read import HeldTensor
    from featherweight.runtimes.candidate import Candidate
    from featherweight.runtimes.offers import Offer
    from featherweight.runtimes.writing import Source

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox", "opt", "phi")
ENCODERS = ("bert", "distilbert", "roberta", "electra")
"""Model types whose graphs TVM was seen to take, and to compute as PyTorch does."""


class TvmSpec(CompileSpec):
    """precision: int8 keeps weights in 8 bits and computes in float32; it rounds here only where no quantize stage chose them."""

    engine: Literal["tvm"]
    precision: Literal["float32", "int8"] = "float32"


class Tvm(Runtime[TvmSpec]):
    """Everything that is known of it."""

    name = "tvm"
    spec = TvmSpec
    loads_with = "featherweight.runtimes.tvm.loaded:TvmModel"
    libraries = ("torch", "transformers")
    requirements = ("torch",)
    toolchain = "tvm"
    toolchain_libraries = ("apache-tvm",)
    writing_s = 40
    weight_s = 1e-7

    def write(self, spec: TvmSpec, source: Source, out: Path) -> None:
        from featherweight.runtimes.tvm.write import write

        write(spec, source, out)

    def served_note(self, serving: Serving) -> str | None:
        return f"compiled for {serving.options['made_for']}"

    def held_tensors(self, folder: Path, serving: Serving, config: PreTrainedConfig) -> Iterator[HeldTensor]:
        from featherweight.runtimes.tvm.bytes_read import held_tensors

        return held_tensors(folder)

    def offers(self, device: Device, machine: Machine) -> Iterator[Offer]:
        from featherweight.runtimes.tvm.offers import offers

        return offers(device)

    def task_refusal(self, task: Task) -> str | None:
        return both_stacks_refusal("TVM", task)

    def grid_refusal(self, grids: Grids, spec: TvmSpec) -> str | None:
        if grids.body is None:
            return None
        if spec.precision == "float32":
            return float_of_rounded_refusal("float32")
        return rows_of_8_bits_refusal("TVM's kernels here hold 8-bit integers of one scale per row", grids)

    def model_refusal(self, spec: TvmSpec, model: Candidate) -> str | None:
        """Model types that were not tried, and what its attention here does not compute."""
        kind, config = model.facts.model_type, model.config
        if reason := answers_refusal("TVM", config):
            return reason
        if kind not in (*DECODERS, *ENCODERS):
            return f"TVM's graphs here were tried with {', '.join((*DECODERS, *ENCODERS))}, not with {kind}; take another engine"
        return _attention_refusal(kind, config, model.max_tokens)

    def unwritable(self) -> str | None:
        """It needs a C++ compiler, to link."""
        return self.missing() or compiler_refusal("TVM")


def _attention_refusal(kind: str, config: Any, tokens: int) -> str | None:
    """Windows that are crossed, caps, and rotary embeddings that ask for the length, which one graph cannot."""
    window = sliding_window(config)
    if window and tokens > window and getattr(config, "use_sliding_window", True):
        return (
            f"TVM's attention here has no sliding window, {kind}'s is of {window} tokens, and {tokens} are to be served; "
            "take another engine"
        )
    if attention_cap(config):
        return f"TVM's attention here caps no logits, as this {kind} does; take another engine"
    return rotary_length_refusal("TVM", config)


TVM = Tvm()
