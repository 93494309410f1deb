"""Writing what an engine serves: a checkpoint is read, refused or written by the engine's Runtime, and held to PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.facts import facts_of
from featherweight.checkpoint.kept_adapters import adapted, kept_adapters
from featherweight.checkpoint.opening import load_config
from featherweight.checkpoint.saving import link_checkpoint, save_as, save_model
from featherweight.checkpoint.streamed import Change, is_large, mapped_model, streamed_model
from featherweight.checkpoint.tensors import stored_type
from featherweight.errors import FeatherweightError, RecipeError, StageError, ToolchainError
from featherweight.grid import GRIDS, Grid
from featherweight.model.architecture import stacks, task_of
from featherweight.model.matrices import move_to_grid, on_grid, round_to_nearest
from featherweight.model.positions import UNBOUNDED, context_tokens
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Metrics, Progress
from featherweight.runtimes.alternatives import advised
from featherweight.runtimes.answer_parity import AnswerReference
from featherweight.runtimes.candidate import Candidate, rows_of, served_tokens
from featherweight.runtimes.catalog import BASELINE, RUNTIMES
from featherweight.runtimes.interface import Grids, Runtime
from featherweight.runtimes.lossless import check_lossless
from featherweight.runtimes.parity import Reference, load_reference
from featherweight.runtimes.spec import ServingSpec
from featherweight.spec import HEADED
from featherweight.store.mapped import give_back_heap
from featherweight.store.served_folder import SERVED_TOKENS, Serving
from featherweight.system.device import CPU, CUDA, Device, cuda_refusal, current, seen_from
from featherweight.system.machine import describe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FLOAT_BYTES = 4
PART_BYTES = 2**30
"""Bytes in float32 of the layers that are looked at alone, where a model is too large to be looked at as a whole."""


@dataclass
class Source:
    """What a runtime writes from: a checkpoint folder, its PyTorch model and quantized weights; a folder of calibration text.

    quantized: None for a checkpoint in float, until `round` has rounded it. tokens: the longest sequence that is to be served.
    device: where; the model itself stays in main memory, where every converter wants it.
    may_stream: the weights of a large decoder are to stay in the checkpoint's files (checkpoint/streamed.py).
    change: what is done to weights that stay there, as PyTorch computes with them. folder: where their integers wait.
    draft: the served folder of the smaller model that drafts tokens for it, if one does.
    """

    checkpoint: Path
    calibration: Path
    quantized: QuantizedWeights | None
    seed: int
    progress: Progress
    tokens: int = SERVED_TOKENS
    device: Device = CPU
    may_stream: bool = False
    change: Change | None = None
    folder: Path | None = None
    draft: Path | None = None

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's own configuration."""
        return load_config(self.checkpoint)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The checkpoint's model on the CPU, float32; loaded when first asked for.

        Where it `streams`, it is to be read only: its matrices are those of the files, in the type that they are stored in.
        """
        return self._mapped or load_reference(self.checkpoint)

    @cached_property
    def _mapped(self) -> PreTrainedModel | None:
        return mapped_model(self.checkpoint) if self.may_stream and is_large(self.checkpoint) else None

    @property
    def streams(self) -> bool:
        """Whether the weights stay in the checkpoint's files."""
        return self._mapped is not None

    @property
    def room(self) -> Path | None:
        """Where the integers of weights that stay in files wait until they are written; None for those in memory."""
        return self.folder if self.streams else None

    def computing(self, layers: tuple[int, ...] | None = None) -> PreTrainedModel:
        """`model` to compute with, float32, with the weights that are served; where it streams, also some of its layers alone."""
        if not self.streams:
            return self.model.float()
        found = streamed_model(self.checkpoint, self.change, CPU, layers)
        assert found is not None, f"{self.checkpoint} could be mapped"
        return found

    def parts(self) -> list[tuple[int, ...]]:
        """The layers of the model in stretches that are small in float32."""
        first = self.model.get_submodule(stacks(self.model)[0].blocks[0].name)
        count, size = len(stacks(self.model)[0].blocks), FLOAT_BYTES * sum(weight.numel() for weight in first.parameters())
        step = max(1, PART_BYTES // size)
        return [tuple(range(start, min(start + step, count))) for start in range(0, count, step)]

    @property
    def grid(self) -> str | None:
        """Name of the grid of the weights' body."""
        return self.quantized.grid if self.quantized else None

    @property
    def max_tokens(self) -> int:
        """The longest sequence that is served: what is asked for, within the model's context (of source and target, where both)."""
        return served_tokens(self.config, self.tokens)

    @property
    def context(self) -> int | None:
        """The longest sequence that the model was made for; None where it names none."""
        longest = context_tokens(self.config)
        return longest if longest < UNBOUNDED else None

    def round(self, body: Grid, head: Grid | None) -> QuantizedWeights:
        """The quantized weights: the checkpoint's own, or all that it has in float rounded to nearest, which `model` now holds."""
        if self.quantized is None:
            self.quantized = round_to_nearest(self.model, body, head, self.room)
            self.move_to_grid()
        return self.quantized

    def move_to_grid(self) -> None:
        """Let `model` compute with the quantized weights."""
        assert self.quantized
        if self.streams:
            self.change = on_grid(self.model, self.quantized)
        else:
            move_to_grid(self.model, self.quantized)

    def round_floats(self, name: str) -> None:
        """Move what is saved of `model` to a float of 16 bits, in place. Raises StageError for weights beyond float16's range.

        What is computed anew at each load, such as the frequencies of rotary positions, no engine rounds. Matrices that lie in the
        checkpoint's files stay as they are there.
        """
        import torch

        kind = getattr(torch, name)
        for tensor in self.model.state_dict(keep_vars=True).values():
            rounded = tensor.data.to(kind) if tensor.is_floating_point() else tensor.data
            if isinstance(tensor, torch.nn.Parameter) and not rounded.isfinite().all():
                raise StageError(f"some weights are too large for {name}; take bfloat16")
            if not self.streams:
                tensor.data = rounded
            elif tensor.ndim < 2:
                tensor.data = rounded.to(tensor.dtype)
        if self.streams:
            self.change = lambda _, tensor: tensor.to(kind)

    def save_rounded(self, name: str, out: Path) -> None:
        """Write the checkpoint to `out` in a float of 16 bits, by its own files where they are that. Raises as `round_floats`."""
        if stored_type(self.checkpoint) == name:
            link_checkpoint(self.checkpoint, out)
            return
        self.round_floats(name)
        if self.streams:
            save_as(self.checkpoint, out, name)
        else:
            save_model(self.model, out, self.checkpoint)

    def reference(self) -> Reference:
        """What PyTorch says of a few windows of the text, with the weights that `model` has now, in float32."""
        return self._reference_of(self.computing())

    def adapted_references(self) -> dict[str, Reference]:
        """The same with each of the adapters that are kept beside the checkpoint, by name."""
        found: dict[str, Reference] = {}
        for name, folder in kept_adapters(self.checkpoint).items():
            with adapted(self.computing(), folder) as model:
                found[name] = self._reference_of(model)
        return found

    def _reference_of(self, model: PreTrainedModel) -> Reference:
        self.progress.note("comparing with PyTorch")
        kind = AnswerReference if task_of(self.config) in HEADED else Reference
        return kind.of(model, self.checkpoint, self.calibration, self.max_tokens)

    def release(self) -> None:
        """Let go of the weights, before an engine loads them once more."""
        self.__dict__.pop("model", None)
        self.__dict__.pop("_mapped", None)
        self.quantized = self.change = None
        give_back_heap()


def write_served(
    spec: ServingSpec,
    *,
    checkpoint: Path,
    calibration: Path,
    out: Path,
    draft: Path | None = None,
    seed: int = 0,
    progress: Progress = Progress(),
) -> Metrics:
    """Write to `out` what `spec.engine` serves, compare it with PyTorch, and record the length up to which it holds.

    draft: the served folder of the smaller model that drafts for it, if one does; it becomes part of what is served.
    Raises RecipeError for weights that the engine does not hold, ToolchainError where this machine has no kernel for them,
    StageError for an unknown architecture, ParityError where the engine does not compute what PyTorch computes.
    """
    runtime = RUNTIMES[spec.engine]
    where = spec.served_on(current())
    source = Source(checkpoint, calibration, QuantizedWeights.read(checkpoint), seed, progress, spec.max_tokens, where)
    with _advising(spec, source):
        refuse(runtime, spec, source)
    source.draft = draft
    source.may_stream, source.folder = runtime.streams and not kept_adapters(checkpoint), out
    if source.quantized and source.streams:
        source.quantized.seal()
    progress.note(f"writing for {spec.engine}")
    runtime.write(spec, source, out)
    served = Serving.read(out).on(where)
    replace(served, options=served.options | (spec.speculation.options if spec.speculation else {})).write(out)
    by_adapter = source.adapted_references()
    metrics = {**runtime.check(spec, source, out), **_check_adapters(by_adapter, out)}
    if spec.speculation:
        check_lossless(out, source)
    replace(Serving.read(out), max_tokens=source.max_tokens, context=source.context).write(out)
    return metrics


@contextmanager
def _advising(spec: ServingSpec, source: Source) -> Iterator[None]:
    """A refusal names the engines that do not refuse the same."""
    try:
        yield
    except (RecipeError, ToolchainError) as error:
        raise type(error)(advised(str(error), spec, lambda way: _serves(way, source))) from error


def _serves(spec: ServingSpec, source: Source) -> bool:
    try:
        refuse(RUNTIMES[spec.engine], spec, source)
    except FeatherweightError:
        return False
    return RUNTIMES[spec.engine].task_refusal(task_of(source.config)) is None


def _check_adapters(references: Mapping[str, Reference], served: Path) -> Metrics:
    """`parity_adapters_max_abs`, in nats, of all adapters beside a model; nothing where it has none. Raises ParityError."""
    found = [reference.check(served, adapter=name)["parity_max_abs"] for name, reference in references.items()]
    return {"parity_adapters_max_abs": max(found)} if found else {}


def refuse(runtime: Runtime, spec: ServingSpec, source: Source) -> None:
    """Raise RecipeError where the engine does not serve this checkpoint, ToolchainError where this machine cannot.

    The baseline serves the float values of a checkpoint that was loaded quantized.
    """
    quantized = None if spec.engine == BASELINE else source.quantized
    body, head = (quantized.grid, quantized.head) if quantized else (None, None)
    grids = Grids(GRIDS[body] if body else None, GRIDS[head] if head else None)
    if reason := runtime.grids_refusal(grids, spec):
        raise RecipeError(f"{body or 'float'} + {spec.engine}: {reason}")
    if reason := runtime.speculation_refusal(spec):
        raise RecipeError(f"speculation + {spec.engine}: {reason}")
    if kept_adapters(source.checkpoint) and (reason := runtime.adapters_refusal(spec)):
        raise RecipeError(f"checkpoint.adapters + {spec.engine}: {reason}")
    if reason := runtime.machine_refusal(spec, seen_from(source.device, describe())):
        raise ToolchainError(reason)
    if source.device == CUDA and (reason := cuda_refusal()):
        raise ToolchainError(f"{spec.engine} is to be served from a GPU: {reason}")
    if reason := runtime.device_refusal(spec, source.device, describe()):
        raise ToolchainError(reason)
    candidate = Candidate(facts_of(source.checkpoint, source.config), source.tokens, rows_of(quantized), source.device)
    if reason := candidate.refusal(runtime, spec):
        raise RecipeError(reason)
