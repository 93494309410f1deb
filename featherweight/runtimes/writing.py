"""Writing what an engine serves: a checkpoint is read, refused or written by the engine's Runtime, and held to PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.facts import facts_of
from featherweight.checkpoint.opening import load_config
from featherweight.errors import RecipeError, StageError, ToolchainError
from featherweight.grid import GRIDS, Grid
from featherweight.model.architecture import task_of
from featherweight.model.matrices import move_to_grid, round_to_nearest
from featherweight.model.positions import UNBOUNDED, context_tokens
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Metrics, Progress
from featherweight.runtimes.answer_parity import AnswerReference
from featherweight.runtimes.candidate import Candidate, rows_of, served_tokens
from featherweight.runtimes.catalog import BASELINE, RUNTIMES
from featherweight.runtimes.interface import Grids, Runtime
from featherweight.runtimes.parity import Reference, load_reference
from featherweight.runtimes.spec import ServingSpec
from featherweight.spec import HEADED
from featherweight.store.served_folder import SERVED_TOKENS, Serving
from featherweight.system.device import CPU, CUDA, Device, cuda_refusal, current
from featherweight.system.machine import describe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass
class Source:
    """What a runtime writes from: a checkpoint folder, its PyTorch model and quantized weights; a folder of calibration text.

    quantized: None for a checkpoint in float, until `round` has rounded it. tokens: the longest sequence that is to be served.
    device: where; the model itself stays in main memory, where every converter wants it.
    """

    checkpoint: Path
    calibration: Path
    quantized: QuantizedWeights | None
    seed: int
    progress: Progress
    tokens: int = SERVED_TOKENS
    device: Device = CPU

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's own configuration."""
        return load_config(self.checkpoint)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The checkpoint's model, float32, on the CPU; loaded when first asked for."""
        return load_reference(self.checkpoint)

    @property
    def grid(self) -> str | None:
        """Name of the grid of the weights' body."""
        return self.quantized.grid if self.quantized else None

    @property
    def max_tokens(self) -> int:
        """The longest sequence that is served: what is asked for, within the model's context (of source and target, where both)."""
        return served_tokens(self.config, self.tokens)

    def round(self, body: Grid, head: Grid | None) -> QuantizedWeights:
        """The quantized weights: the checkpoint's own, or all that it has in float rounded to nearest, which `model` now holds."""
        if self.quantized is None:
            self.quantized = round_to_nearest(self.model, body, head)
            move_to_grid(self.model, self.quantized)
        return self.quantized

    def round_floats(self, name: str) -> None:
        """Move what is saved of `model` to a float of 16 bits, in place. Raises StageError for weights beyond float16's range.

        What is computed anew at each load, such as the frequencies of rotary positions, no engine rounds.
        """
        import torch

        for tensor in self.model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(getattr(torch, name))
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            raise StageError(f"some weights are too large for {name}; take bfloat16")

    def reference(self) -> Reference:
        """What PyTorch says of a few windows of the text, with the weights that `model` has now, in float32."""
        self.progress.note("comparing with PyTorch")
        kind = AnswerReference if task_of(self.config) in HEADED else Reference
        return kind.of(self.model.float(), self.checkpoint, self.calibration, self.max_tokens)

    def release(self) -> None:
        """Let go of the weights, before an engine loads them once more."""
        self.__dict__.pop("model", None)
        self.quantized = None


def write_served(
    spec: ServingSpec, *, checkpoint: Path, calibration: Path, out: Path, seed: int = 0, progress: Progress = Progress()
) -> Metrics:
    """Write to `out` what `spec.engine` serves, compare it with PyTorch, and record the length up to which it holds.

    Raises RecipeError for weights that the engine does not hold, ToolchainError where this machine has no kernel for them,
    StageError for an unknown architecture, ParityError where the engine does not compute what PyTorch computes.
    """
    runtime = RUNTIMES[spec.engine]
    where = spec.served_on(current())
    source = Source(checkpoint, calibration, QuantizedWeights.read(checkpoint), seed, progress, spec.max_tokens, where)
    refuse(runtime, spec, source)
    progress.note(f"writing for {spec.engine}")
    runtime.write(spec, source, out)
    Serving.read(out).on(where).write(out)
    metrics = runtime.check(spec, source, out)
    replace(Serving.read(out), max_tokens=source.max_tokens).write(out)
    return metrics


def length_note(served: Path) -> str | None:
    """What the report says of a served folder that is offered for less than its model's context; None where it is for all of it."""
    verified, context = Serving.read(served).max_tokens, context_tokens(load_config(served))
    if verified is None or verified >= context:
        return None
    whole = f" of a context of {context}" if context < UNBOUNDED else ""
    return f"verified and served up to {verified} tokens{whole}; workload.max_tokens raises it"


def refuse(runtime: Runtime, spec: ServingSpec, source: Source) -> None:
    """Raise RecipeError where the engine does not serve this checkpoint, ToolchainError where this machine cannot.

    The baseline serves the float values of a checkpoint that was loaded quantized.
    """
    quantized = None if spec.engine == BASELINE else source.quantized
    body, head = (quantized.grid, quantized.head) if quantized else (None, None)
    grids = Grids(GRIDS[body] if body else None, GRIDS[head] if head else None)
    if reason := runtime.grid_refusal(grids, spec):
        raise RecipeError(f"{body or 'float'} + {spec.engine}: {reason}")
    if reason := runtime.machine_refusal(spec, describe()):
        raise ToolchainError(reason)
    if source.device == CUDA and (reason := cuda_refusal()):
        raise ToolchainError(f"{spec.engine} is to be served from a GPU: {reason}")
    if reason := runtime.device_refusal(spec, source.device, describe()):
        raise ToolchainError(reason)
    candidate = Candidate(facts_of(source.checkpoint, source.config), source.tokens, rows_of(quantized), source.device)
    if reason := candidate.refusal(runtime, spec):
        raise RecipeError(reason)
