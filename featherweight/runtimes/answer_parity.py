"""Parity of encoders that answer by vectors or labels: the same gate as featherweight/runtimes/parity.py, on their answers.

Compared are texts as long as the longest that is served and as its quarters, of one part and of two, and short ones of the
calibration text; several at once, so that the shorter ones are padded, with PyTorch's answers to each alone. A difference is, of
vectors, the distance between the two at length 1, sqrt(2 - 2 cosine); of labels it is in nats: where the bound is one of the
largest difference, that of any label, else the mean by PyTorch's own distribution.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from featherweight.model.architecture import task_of
from featherweight.model.heads import answers
from featherweight.model.positions import context_tokens
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import Bound
from featherweight.runtimes.client import open_worker
from featherweight.runtimes.parity import Reference, bound_of, told
from featherweight.spec import Task
from featherweight.store.served_folder import SERVED_TOKENS, Serving
from featherweight.text.examples import Example, head_windows, packed_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORT_WINDOWS = 8
LONG_WINDOWS = 4
AT_ONCE = 4
Rows = list[list[float]]


@dataclass(frozen=True)
class AnswerReference(Reference):
    """Texts and what the PyTorch model answers to each: rows of numbers, see featherweight/model/heads.py."""

    fewest: ClassVar[int] = 1

    task: Task = "feature-extraction"
    examples: list[Example] = field(default_factory=list)
    answers: list[Rows] = field(default_factory=list)

    @classmethod
    def of(cls, model: PreTrainedModel, source: Path, text: Path, max_tokens: int = SERVED_TOKENS) -> AnswerReference:
        """What `model` answers to texts of up to `max_tokens`, made of `text`; `source` has the tokenizer."""
        tokens = min(max_tokens, context_tokens(model.config))
        windows = _windows(model, source, text, tokens)
        quarters = [tokens * quarter // 4 for quarter in range(4)]
        found = [_answer(model, one) for one in windows]
        places = [[len(one.ids) - 1] * len(rows) for one, rows in zip(windows, found, strict=True)]
        return cls([*windows], [], places, quarters, task=task_of(model.config), examples=windows, answers=found)

    def check(self, served: Path, bound: Bound | None = None, adapter: str | None = None) -> Metrics:
        """As Reference.check does, for answers; no adapter is kept beside a model of another task than text-generation."""
        serving = Serving.read(served)
        bound, name = bound or bound_of(serving), f"{serving.engine} ({serving.grid or 'float'})"
        with (
            open_worker(served, threads=1, max_tokens=self.longest, max_batch=AT_ONCE) as worker,
            told(name, self.longest),
        ):
            found = worker.outputs([one.ids for one in self.examples], [one.types for one in self.examples])
        return self.hold_answers(found, bound, name)

    def hold_twin(self, model: PreTrainedModel, bound: Bound, name: str) -> Metrics:
        return self.hold_answers([_answer(model, one) for one in self.examples], bound, name)

    def hold_answers(self, found: list[Rows], bound: Bound, name: str) -> Metrics:
        """Hold what `name` has answered to `bound`."""
        pairs = zip(self.answers, found, strict=True)
        differences = [apart(self.task, ours, theirs, worst=bound.statistic == "max") for ours, theirs in pairs]
        return self.hold_differences(differences, bound, name)


def apart(task: Task, ours: Rows, theirs: Rows, worst: bool) -> list[float]:
    """How far an answer is from PyTorch's, a number for each of its rows; see the head of this file."""
    import torch

    one, other = (torch.tensor(rows, dtype=torch.float64) for rows in (ours, theirs))
    if task == "feature-extraction":
        one, other = (torch.nn.functional.normalize(rows, dim=-1) for rows in (one, other))
        return (one - other).norm(dim=-1).tolist()
    logs, found = one.log_softmax(-1), other.log_softmax(-1)
    difference = (logs - found).abs()
    return (difference.amax(-1) if worst else (logs.exp() * difference).sum(-1)).tolist()


def _windows(model: PreTrainedModel, source: Path, text: Path, tokens: int) -> list[Example]:
    """Long texts of pieces end to end, and short ones as they are."""
    short = head_windows(source, model.config, text, tokens, SHORT_WINDOWS)
    lengths = [tokens] * LONG_WINDOWS + [length for length in (3 * tokens // 4, tokens // 2, tokens // 4) if length > 2] * 2
    return [*(_joined(short, length, place) for place, length in enumerate(lengths)), *short]


def _joined(pieces: list[Example], length: int, place: int) -> Example:
    """A text of `length` tokens, other ones for each `place`; of every second one the second half is another part."""
    first, last = pieces[0].ids[0], pieces[0].ids[-1]
    bodies = chain.from_iterable(piece.ids[1:-1] for piece in [*pieces[place % len(pieces) :], *pieces[: place % len(pieces)]])
    body = list(islice(cycle(bodies), length - 2))
    half = length // 2 if place % 2 else length
    return Example([first, *body, last], 0, types=[0] * half + [1] * (length - half))


def _answer(model: PreTrainedModel, one: Example) -> Rows:
    import torch

    with torch.inference_mode():
        rows: Rows = answers(model, packed_inputs(model.config, [one.ids], [one.types]))[0].float().tolist()
        return rows
