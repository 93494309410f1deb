"""PyTorch's AOTInductor, declared: encoders and decoders in float32, compiled ahead of time for this machine's kind of CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from featherweight.runtimes.code_levels import GENERIC, level
from featherweight.runtimes.interface import Grids, Runtime
from featherweight.runtimes.refusals import (
    both_stacks_refusal,
    compiler_refusal,
    float_of_rounded_refusal,
    keys_and_values_refusal,
    other_layers_refusal,
    own_attention_refusal,
    rotary_length_refusal,
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


OTHERWISE = ("hrm_text",)
"""Model types whose compiled step has other logits behind long texts (7.6 nats behind 112 tokens, torch 2.13). They pass through
their layers again and again; uncompiled, over short texts, the step is right.
"""


class TorchAotiSpec(CompileSpec):
    """float32 alone."""

    engine: Literal["torch-aoti"]


class TorchAoti(Runtime[TorchAotiSpec]):
    """Everything that is known of it."""

    name = "torch-aoti"
    spec = TorchAotiSpec
    loads_with = "featherweight.runtimes.torch_aoti.loaded:AotiModel"
    modules = ("torch",)
    libraries = ("torch", "transformers")
    requirements = ("torch",)
    writing_s = 50
    weight_s = 1e-6

    def write(self, spec: TorchAotiSpec, source: Source, out: Path) -> None:
        from featherweight.runtimes.torch_aoti.write import write

        write(source, out)

    def served_note(self, serving: Serving) -> str | None:
        return f"compiled for {serving.options['made_for']}"

    def held_tensors(self, folder: Path, serving: Serving, config: PreTrainedConfig) -> Iterator[HeldTensor]:
        from featherweight.runtimes.torch_aoti.bytes_read import held_tensors

        return held_tensors(folder)

    def offers(self, device: Device, machine: Machine) -> Iterator[Offer]:
        from featherweight.runtimes.torch_aoti.offers import offers

        return offers(device)

    def task_refusal(self, task: Task) -> str | None:
        return both_stacks_refusal("AOTInductor", task)

    def grid_refusal(self, grids: Grids, spec: TorchAotiSpec) -> str | None:
        return None if grids.body is None else float_of_rounded_refusal("float32")

    def machine_refusal(self, spec: TorchAotiSpec, machine: Machine) -> str | None:
        """It says of its code what a CPU must have, which is known of x86-64's levels alone."""
        return "torch-aoti compiles for x86-64 with AVX2 or AVX-512 here" if level(machine) == GENERIC else None

    def model_refusal(self, spec: TorchAotiSpec, model: Candidate) -> str | None:
        config = model.config
        if config.model_type in OTHERWISE:
            return f"AOTInductor's compiled step of a {config.model_type} writes other tokens than PyTorch; take another engine"
        return (
            keys_and_values_refusal(self.name, config)
            or other_layers_refusal(self.name, config)
            or own_attention_refusal(self.name, config)
            or rotary_length_refusal(self.name, config)
        )

    def unwritable(self) -> str | None:
        """It needs a C++ compiler; to serve what it wrote, none."""
        return self.missing() or compiler_refusal("torch-aoti")


TORCH_AOTI = TorchAoti()
