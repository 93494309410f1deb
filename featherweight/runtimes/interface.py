"""What every engine is: the part of a runtime that lives in the worker's process, next to the library that serves."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from featherweight.errors import StageError
from featherweight.store.served_folder import Serving
from featherweight.system.processes import peak_bytes

Tokens = list[list[int]]


@dataclass(frozen=True)
class Limits:
    """What an engine must hold at once: sequences of `max_tokens` (prompt and new tokens), `max_batch` of them."""

    threads: int
    max_tokens: int = 512
    max_batch: int = 8


@dataclass(frozen=True)
class Timing:
    """Wall times of one batch: until every sequence has its first new token, and until all have their last."""

    ttft_s: float
    total_s: float


@dataclass(frozen=True)
class Generation:
    """The new tokens of each prompt, and how long they took."""

    tokens: Tokens
    timing: Timing


class LoadedModel(ABC):
    """A served folder, loaded. `threads` may be changed later; an engine that cannot switch loads itself anew.

    slow_to_switch: doing so takes tens of seconds, so that few counts of threads are worth trying.
    """

    slow_to_switch: ClassVar[bool] = False

    def __init__(self, served: Path, serving: Serving, limits: Limits) -> None:
        self.served = served
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

    @abstractmethod
    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        """Greedy; exactly `new_tokens` each. The end-of-text token counts as any other and stops nothing.

        Seq2seq: prompts are sources, and a language that the checkpoint forces is the first new token. Encoder: one forward
        pass, whose likeliest token at every position is what comes back; `new_tokens` plays no role.
        """

    def peak_memory_bytes(self) -> int:
        """The largest resident set so far, in bytes."""
        return peak_bytes(os.getpid())


def by_length(sequences: Tokens, most: int) -> Iterator[list[int]]:
    """Indices in batches of equal length, at most `most` each: what needs no padding cannot be padded wrongly."""
    lengths: dict[int, list[int]] = {}
    for index, ids in enumerate(sequences):
        lengths.setdefault(len(ids), []).append(index)
    for indices in lengths.values():
        yield from (indices[start : start + most] for start in range(0, len(indices), most))


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
