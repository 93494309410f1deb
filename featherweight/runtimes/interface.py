"""What every engine is to us: a Runtime, which declares it, and a LoadedModel, which serves a folder with it.

A Runtime is light and lives wherever a recipe is read, planned, exported or registered; all that is known of an engine stands in
it or is called by it. A LoadedModel lives in the worker's process, next to the library that serves.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from featherweight.errors import StageError, ToolchainError
from featherweight.grid import Grid
from featherweight.model.sparsity import SEMI_STRUCTURED
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT, Bound
from featherweight.runtimes.generation_settings import LENGTHS, GenerationSettings
from featherweight.runtimes.gpu_memory import GpuMemory
from featherweight.runtimes.line import Ask, Line, Schedule, Written
from featherweight.runtimes.refusals import devices_refusal
from featherweight.runtimes.spec import ServingSpec
from featherweight.spec import Task
from featherweight.store.served_folder import Serving
from featherweight.system.device import CPU, Device
from featherweight.system.machine import Machine
from featherweight.system.processes import peak_bytes
from featherweight.system.toolchains import python

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from featherweight.runtimes.bytes_read import HeldTensor
    from featherweight.runtimes.candidate import Candidate
    from featherweight.runtimes.offers import Offer
    from featherweight.runtimes.writing import Source

Tokens = list[list[int]]
SpecOf = TypeVar("SpecOf", bound=ServingSpec)


@dataclass(frozen=True)
class Grids:
    """What weights lie on: the body, the head (embedding and output head), the matrices that mixed precision keeps finer.

    None for float, and for no finer ones.
    """

    body: Grid | None = None
    head: Grid | None = None
    finer: Grid | None = None


@dataclass(frozen=True)
class EngineServer:
    """An engine's own HTTP server on a Unix socket: how it is started, and what it is asked.

    environment: changes to ours. paths: what users may ask; the rest of what it answers is for who runs it. example: the path
    and the JSON of a short request. here_alone: why the engine by itself, elsewhere, would answer otherwise; None where it
    would not.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    paths: tuple[str, ...]
    example: tuple[str, Mapping[str, Any]]
    here_alone: str | None = None


class Runtime(ABC, Generic[SpecOf]):
    """All that is known of an engine. Importing one imports no library of the engine.

    A reason not to do something stands in a method that is named a refusal, in one line: such a method shapes no result, so that
    no cache key knows it.
    """

    name: str
    """What recipes call it."""
    spec: type[SpecOf]
    """The keys of a recipe that it reads; its base says whether `compile` or `export` makes what it serves."""
    loads_with: str
    """Its LoadedModel, as 'module:class'."""
    modules: tuple[str, ...] = ()
    """What must be importable here for it to serve."""
    libraries: tuple[str, ...] = ()
    """Distributions whose versions shape what it writes or computes."""
    requirements: tuple[str, ...] = ()
    """Distributions that a registered model needs to be served by it."""
    toolchain: str | None = None
    """The environment of its own that it runs in, where it cannot live in this one."""
    writes_with: str | None = None
    """The environment of its own that its writer runs in, where what is written is served by this one."""
    gains_by: str | None = None
    """The environment of its own that makes it faster where it is there."""
    toolchain_libraries: tuple[str, ...] = ()
    """Distributions of that environment whose versions are told by name; of all others it is told that one has changed."""
    writing_s: float = 5
    measuring_s: float = 12
    """Seconds of writing and of measuring a variant that do not depend on its size (seen on two AVX2 cores)."""
    weight_s: float = 0.0
    """Seconds more for each weight, where its converter takes its time."""
    slow_to_switch: bool = False
    """Another number of threads costs it tens of seconds, so that few are worth trying."""
    layers_may_differ: bool = False
    """It stores every layer in its own shape, and gains from narrower ones."""
    fewest_bits: int = 4
    """Of the integers that it has a product for."""
    streams: bool = False
    """It writes matrix by matrix what `Source.model` reads from files, so that a large model need not fit in memory."""
    devices: tuple[Device, ...] = (CPU,)
    """Where it can serve from."""
    joins: bool = False
    """A text joins those that it is writing, so that none waits for a batch to fill."""
    speculates: tuple[str, ...] = ()
    """The methods of speculation (runtimes/speculation.py) that it writes by."""

    @abstractmethod
    def write(self, spec: SpecOf, source: Source, out: Path) -> None:
        """Write what it serves, and `serving.json`, to the empty folder `out`.

        Quantized weights of `source` are packed as they are; float ones are rounded where `spec`, or the engine's name, says so.
        `source.model` is left with the weights that are served. Raises StageError for an unknown architecture.
        """

    def check(self, spec: SpecOf, source: Source, served: Path) -> Metrics:
        """Compare what was written with PyTorch: metrics in nats (see Reference.check). Raises ParityError above the bound."""
        reference = source.reference()
        source.release()
        return reference.check(served)

    def bound(self, serving: Serving) -> Bound:
        """How far its log-probabilities may be from PyTorch's, by how it handles activations."""
        return EXACT

    def held_tensors(self, folder: Path, serving: Serving, config: PreTrainedConfig) -> Iterator[HeldTensor]:
        """The tensors of its own files in `folder` as it holds them while it serves; here for transformers' own."""
        from featherweight.runtimes.bytes_read import checkpoint_tensors

        return checkpoint_tensors(folder, serving, config)

    def task_refusal(self, task: Task) -> str | None:
        """Why it does not serve a model for `task`; None where it does."""
        return None

    def grids_refusal(self, grids: Grids, spec: SpecOf) -> str | None:
        """`grid_refusal`, where it has products for so few bits at all."""
        every = [grid for grid in (grids.body, grids.head, grids.finer) if grid]
        narrow = next((grid for grid in every if grid.bits < self.fewest_bits), None)
        if narrow:
            return f"it has no product of {narrow.bits}-bit integers ({narrow.name}); take another engine"
        return self.grid_refusal(grids, spec)

    @abstractmethod
    def grid_refusal(self, grids: Grids, spec: SpecOf) -> str | None:
        """Why it cannot or should not serve weights on these grids as `spec` says; None where it can.

        It packs exactly or not at all; and float32 of rounded weights is neither smaller nor faster than that of the weights
        before rounding, and worse.
        """

    def machine_refusal(self, spec: SpecOf, machine: Machine) -> str | None:
        """Why `machine` has no kernel for `spec`, naming what it needs; None where it has, or may have."""
        return None

    def device_refusal(self, spec: SpecOf, device: Device, machine: Machine) -> str | None:
        """Why it does not serve `spec` from `device` of `machine`; None where it does, or may. That there is one is known."""
        return None if device in self.devices else devices_refusal(self.name, device)

    def adapters_refusal(self, spec: SpecOf) -> str | None:
        """Why it serves no adapters beside a model (see LoadedModel.adapt), in one line; None where it does."""
        return "it serves one model, with no adapters beside it; take another engine, or merge one: its folder is the source"

    def speculation_refusal(self, spec: SpecOf) -> str | None:
        """Why it drafts no tokens as `spec` asks it to; None where it does, or is not asked."""
        asked = spec.speculation
        if asked is None or asked.method in self.speculates:
            return None
        does = f"speculates by {', '.join(self.speculates)} here" if self.speculates else "writes one token a pass here"
        return f"{self.name} {does}, and not by {asked.method}; take another engine, or leave it out"

    def model_refusal(self, spec: SpecOf, model: Candidate) -> str | None:
        """Why it does not serve this very checkpoint, once it is known; None where it does, or where only writing will tell.

        Asked by the plan where the checkpoint's folder can be read, and again before anything is written.
        """
        return None

    def offers(self, device: Device, machine: Machine) -> Iterable[Offer]:
        """The ways to serve that are worth considering, and what is to be expected of each; here as PyTorch's, in float."""
        from featherweight.runtimes.offers import Offer, Reach

        return [Offer(Reach(0.45, 0.25, 5e-4), device=device)]

    def missing(self) -> str | None:
        """None if it can be started here, else the reason why not and how to get it."""
        if absent := [name for name in self.modules if find_spec(name) is None]:
            return f"{absent[0]} is not installed; run 'make setup'"
        try:
            if self.toolchain:
                python(self.toolchain)
        except ToolchainError as error:
            return str(error)
        return None

    def unwritable(self) -> str | None:
        """None if what it serves can be written here; else why not, what it cannot be started for included."""
        try:
            if self.writes_with:
                python(self.writes_with)
        except ToolchainError as error:
            return str(error)
        return self.missing()

    def machine_note(self, machine: Machine) -> tuple[str, str] | None:
        """What the machine's processor means for it, and what a recipe should say because of it; None where all is well."""
        return None

    def served_note(self, serving: Serving) -> str | None:
        """What the report says of what was written, such as how the engine was built; one sentence, or None."""
        return None

    def zeros_note(self, pattern: str, share: float) -> str:
        """What zeros in `share` of the pruned weights, in `pattern`, are worth on it: one sentence for the report.

        Here for engines that compute with dense matrices. 2:4 alone has kernels at all, on NVIDIA's GPUs from Ampere on.
        """
        note = f"{share * 100:.0f} % of the pruned weights are zero; "
        note += f"{self.name} stores and multiplies them all: no gain in size or speed"
        if pattern == SEMI_STRUCTURED:
            return f"{note} (2:4 is fast on NVIDIA's sparse tensor cores alone, which {self.name} does not use)"
        return note

    def server(self, served: Path, name: str, limits: Limits, socket: Path) -> EngineServer | None:
        """Its own server of the folder `served` under the name `name`, on a Unix socket; None where it has none."""
        return None

    def loaded_model(self) -> type[LoadedModel]:
        """The class that `loads_with` names."""
        module, _, attribute = self.loads_with.partition(":")
        return getattr(import_module(module), attribute)


@dataclass(frozen=True)
class Limits:
    """What an engine must hold at once: sequences of `max_tokens` (prompt and new tokens), `max_batch` of them.

    batch_window_s: so long those wait for others whose batch is not full (see Line).
    """

    threads: int
    max_tokens: int = 512
    max_batch: int = 8
    batch_window_s: float = 0.0


@dataclass(frozen=True)
class Timing:
    """Wall times of one batch: until every sequence has its first new token, and until all have their last."""

    ttft_s: float
    total_s: float


@dataclass(frozen=True)
class Acceptance:
    """How an engine has fared with drafted tokens: in so many passes over a text it has written so many tokens."""

    passes: int
    written: int


@dataclass(frozen=True)
class Generation:
    """The new tokens of each prompt, and how long they took."""

    tokens: Tokens
    timing: Timing


class LoadedModel(ABC):
    """A served folder, loaded. `threads` may be changed later; an engine that cannot switch loads itself anew.

    follows: the settings of a checkpoint's generation_config.json that its answers follow.
    """

    follows: ClassVar[frozenset[str]] = LENGTHS
    gpu_memory: GpuMemory | None = None
    adapter: str | None = None

    def __init__(self, served: Path, serving: Serving, limits: Limits) -> None:
        self.served = served
        self.device = serving.device
        self.weights = served / serving.weights
        self.options = serving.options
        self.limits = limits
        self.threads = limits.threads
        self.load()

    @abstractmethod
    def load(self) -> None:
        """Load the weights for `self.threads` threads; called again, with another number, after `unload`."""

    def unload(self) -> None:  # noqa: B027 - an engine that switches threads in place has nothing to let go of
        """Let go of what `load` made, before it is called again and at the end."""

    def set_threads(self, threads: int) -> None:
        """Serve with `threads` threads from now on."""
        self.unload()
        self.threads = threads
        self.load()

    @abstractmethod
    def logprobs(self, windows: Tokens) -> list[list[float]]:
        """Natural-log probabilities of ids[1:] of each window, given their prefixes."""

    def logprobs_given(self, windows: Tokens, sources: Tokens) -> list[list[float]]:
        """The same for windows with a source (see featherweight.text.tokens.Window): of ids[1:], or of the masked tokens."""
        raise StageError(f"{type(self).__name__} serves causal models only, which have no source")

    def outputs(self, ids: Tokens, types: Tokens) -> list[list[list[float]]]:
        """What an encoder with another head answers to each sequence: rows of numbers, see featherweight/model/heads.py.

        types: which of two texts each token belongs to. Sequences of any lengths; each answer is that of the sequence alone.
        """
        raise StageError(f"{type(self).__name__} serves no encoder that answers by vectors or labels")

    @abstractmethod
    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        """Greedy; exactly `new_tokens` each. The end-of-text token counts as any other and stops nothing.

        Seq2seq: prompts are sources, and a language that the checkpoint forces is the first new token. Encoder: one forward
        pass, whose likeliest token at every position is what comes back, or nothing where it answers by vectors or labels;
        `new_tokens` plays no role.
        """

    def answer(self, prompts: Tokens, new_tokens: int, settings: dict[str, Any]) -> Tokens:
        """What follows each prompt where a checkpoint's generation settings are followed: `new_tokens` at most, with an end token.

        settings: GenerationSettings.values. Raises StageError for one that this engine does not follow.
        """
        wanted = GenerationSettings(settings)
        if reason := wanted.refusal(self.follows, type(self).__name__):
            raise StageError(reason)
        return [wanted.cut(tokens, new_tokens) for tokens in self.write(prompts, new_tokens, wanted)]

    def write(self, prompts: Tokens, new_tokens: int, settings: GenerationSettings) -> Tokens:
        """The same, with what is written behind an end still there. By default a greedy text, in which nothing is an end."""
        return self.generate(prompts, new_tokens).tokens

    def converse(self, line: Line) -> None:
        """Answer those that wait in `line` until nobody does.

        Here batch after batch: the first, and whoever is alike and waits as well, `limits.max_batch` at most. An engine that lets
        a text join those that it is writing says so by a method of its own.
        """
        while batch := line.next_batch(self.limits.max_batch, idle=True):
            try:
                self.write_batch(batch, line).tell(line, batch)
            except Exception as error:
                line.failed(batch, error)

    def write_batch(self, batch: list[Ask], line: Line) -> Written:
        """What such a batch is answered with."""
        first, prompts, began = batch[0], [ask.prompt for ask in batch], line.now
        if first.types is not None:
            rows = self.outputs(prompts, [ask.types or [] for ask in batch])
            return Written(rows, done := line.now, done)
        self.take_adapter(first.adapter)
        if first.settings:
            tokens = self.answer(prompts, first.new_tokens, dict(first.settings))
            return Written(tokens, line.now, line.now)
        generation = self.generate(prompts, first.new_tokens)
        return Written(generation.tokens, began + generation.timing.ttft_s, line.now)

    def under_load(
        self,
        prompts: Tokens,
        new_tokens: int,
        times_s: list[float],
        patience_s: float,
        most: int,
        window_s: float,
        headed: bool = False,
    ) -> list[tuple[float | None, float | None]]:
        """Ask for a greedy text behind each prompt at its time, whatever is still being answered; see Schedule.times.

        patience_s: so long an answer may take to begin. most, window_s: see Line. headed: vectors or labels are asked for.
        """
        asks = [
            Ask(prompt, new_tokens, types=[0] * len(prompt) if headed else None, came=at, until=at + patience_s)
            for prompt, at in zip(prompts, times_s, strict=True)
        ]
        line = Schedule(asks, times_s, most=most, window_s=window_s)
        self.converse(line)
        return line.times

    def acceptance(self) -> Acceptance | None:
        """How it has fared with drafted tokens so far; None where it has none, or does not tell."""
        return None

    def take_adapter(self, name: str | None) -> None:
        """`adapt`, where another one computes."""
        if name != self.adapter:
            self.adapt(name)
            self.adapter = name

    def adapt(self, name: str | None) -> None:
        """Compute from now on with the adapter of that name beside the model (checkpoint/kept_adapters.py); None for the model."""
        if name is not None:
            raise StageError(f"{type(self).__name__} serves no adapters beside a model")

    def served_on(self) -> Device:
        """The device that the weights lie on, as the engine itself knows it; here of engines that have no other than the CPU."""
        return CPU

    def attention(self) -> dict[str, str]:
        """PyTorch's attention kernel for each of its passes (see torch/attention_backend.py); none of engines with their own."""
        return {}

    def peak_memory_bytes(self) -> int:
        """The largest resident set so far, in bytes."""
        return peak_bytes(os.getpid())

    def peak_gpu_memory_bytes(self) -> int | None:
        """The most of the GPUs' memory so far, in bytes; None on a CPU, and where the driver does not tell."""
        return self.gpu_memory.peak_bytes if self.gpu_memory else None

    def peak_tensor_bytes(self) -> int | None:
        """What of it PyTorch's tensors took at most; None for engines that are not PyTorch's."""
        return None


def by_length(sequences: Tokens, most: int) -> Iterator[list[int]]:
    """Indices in batches of equal length, at most `most` each: what needs no padding cannot be padded wrongly."""
    lengths: dict[int, list[int]] = {}
    for index, ids in enumerate(sequences):
        lengths.setdefault(len(ids), []).append(index)
    for indices in lengths.values():
        yield from (indices[start : start + most] for start in range(0, len(indices), most))


def alike(sequences: Tokens, most: int) -> Iterator[list[int]]:
    """Indices in batches of like lengths, the longest first, at most `most` each: little of a batch is padding."""
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    yield from (order[start : start + most] for start in range(0, len(order), most))


def by_shape(windows: Tokens, sources: Tokens, most: int) -> Iterator[list[int]]:
    """The same for windows with sources: both of equal length within a batch."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, (ids, source) in enumerate(zip(windows, sources, strict=True)):
        shapes.setdefault((len(ids), len(source)), []).append(index)
    for indices in shapes.values():
        yield from (indices[start : start + most] for start in range(0, len(indices), most))


def windows_at_once(tokens: int, vocabulary: int) -> int:
    """How many windows to score together so that their float32 logits stay within 128 MiB (at least one)."""
    return max(1, 2**25 // (tokens * vocabulary))
