"""Every engine and grid that is worth considering: whether it can serve, whether it fits, and what is to be expected of it.

What it cannot is asked of the planner's own refusals; there is no second list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from featherweight.checkpoint.facts import kept_refusal
from featherweight.grid import grid_named
from featherweight.measure.figures import percent
from featherweight.model.facts import CheckpointFacts
from featherweight.quantization.catalog import QUANTIZERS
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.advice.expected import MIXED_LOSS, Asked, Expected, bytes_of, expected
from featherweight.recipe.advice.hardware import USABLE, Roofs
from featherweight.recipe.advice.measured import Before, Key, computes
from featherweight.recipe.advice.shape import Shape
from featherweight.recipe.refusals import Chosen, gib
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.offers import Offer
from featherweight.runtimes.spec import CompileSpec, ExportSpec, ServingSpec
from featherweight.spec import Task
from featherweight.system.machine import Machine

AS_FAST = 1.03
"""A ratio of speeds that no estimate tells apart."""
LEVEL = 0.002
"""Losses so near to each other are level: calibration text alone moves them by as much."""

LONG_S, MANY = 300.0, 10
"""Seconds of a method, and times as much as others take, beyond which it is left to recipes that ask for it."""
REACHED = 0.35
"""The share of a device's operations that calibration reaches."""


@dataclass(frozen=True)
class Question:
    """A checkpoint, a machine, a workload: what advice is asked about.

    here: the machine is this one, so that what is installed counts. max_loss: of bits per byte, as a share; None for no bound.
    """

    source: str
    facts: CheckpointFacts
    task: Task
    machine: Machine
    roofs: Roofs
    asked: Asked = field(default_factory=Asked)
    max_loss: float | None = 0.01
    here: bool = True
    before: Before = field(default_factory=Before)

    @cached_property
    def shape(self) -> Shape:
        """How large the model is where it counts."""
        return Shape.of(self.facts)

    @property
    def max_tokens(self) -> int:
        """The longest sequence."""
        return max(2, self.asked.prompt_tokens + self.asked.new_tokens)


@dataclass(frozen=True)
class Row:
    """One engine and one grid. quantize: the keys of the stage before it, None for none. refused: why it cannot serve; too_large:
    why it does not fit, each in one line. missing: why it cannot be started here. measured: its loss was."""

    engine: str
    offer: Offer
    serve: ServingSpec
    quantize: QuantizeSpec | None = None
    expected: Expected | None = None
    refused: str | None = None
    too_large: str | None = None
    missing: str | None = None
    measured: bool = False

    @property
    def name(self) -> str:
        """As people call it: the engine, what it computes in, the grid, the GPUs."""
        keys = self.offer.keys
        how = computes(keys)
        on = (
            ""
            if self.offer.grid in (None, how)
            else f" on {self.offer.grid}" + (f" and {self.offer.mixed}" if self.offer.mixed else "")
        )
        return f"{self.engine} {how}".strip() + on + (f", {self.offer.parts} GPUs" if self.offer.parts > 1 else "")

    @property
    def can_serve(self) -> bool:
        """Whether nothing stands in the way."""
        return self.refused is None and self.too_large is None

    def keeps(self, max_loss: float | None) -> bool:
        """Whether its loss is expected within the bound."""
        return self.expected is not None and (max_loss is None or self.expected.loss <= max_loss)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        told: dict[str, Any] = {"engine": self.engine, "name": self.name, **dict(self.offer.keys)}
        told["quantize"] = self.quantize.model_dump(mode="json") if self.quantize else None
        told |= {"refused": self.refused, "too_large": self.too_large, "missing": self.missing}
        if self.expected:
            told |= {"memory_bytes": self.expected.memory_bytes, "weights_bytes": self.expected.weights_bytes}
            told |= {"cache_bytes": self.expected.cache_bytes, "tokens_per_s": self.expected.tokens_per_s}
            told |= {"ttft_s": self.expected.ttft_s, "loss": self.expected.loss, "loss_measured": self.measured}
            told["basis"] = self.expected.basis
        return told


def rows(question: Question) -> list[Row]:
    """All of them: those that serve and fit before the others, the fastest first; of those that are as fast the least lossy."""
    found = [_row(question, engine, offer) for engine in RUNTIMES for offer in _offers(question, engine)]
    return sorted(found, key=_place)


def _place(row: Row) -> tuple[bool, int, float, str]:
    sees = row.expected
    speed = round(math.log(sees.tokens_per_s, AS_FAST)) if sees else -999
    return not row.can_serve, -speed, sees.loss if sees else 1.0, row.name


def _offers(question: Question, engine: str) -> Iterator[Offer]:
    """Those of an engine; of a checkpoint that came on a grid those that hold it, and those in float where nothing else does."""
    kept = question.facts.kept_grids
    for offer in RUNTIMES[engine].offers(question.roofs.device, question.machine):
        if kept is None or offer.grid is None:
            yield offer
        elif offer.mixed is None:
            body, head, _ = kept
            yield replace(
                offer, grid=body.name, head=head.name if head else None, head_bytes=offer.head_bytes if head else offer.width
            )


def _row(question: Question, engine: str, offer: Offer) -> Row:
    serve = _serve(engine, offer, question.max_tokens)
    kept = kept_refusal(question.facts) is not None
    ways: list[QuantizeSpec | None] = [None] if offer.grid is None or kept else [*methods(question, offer)]
    told = [(way, _refusal(question, way, serve)) for way in ways]
    method, refused = next(((one, reason) for one, reason in told if reason is None), told[0])
    missing = RUNTIMES[engine].unwritable() if question.here else None
    if refused is not None:
        return Row(engine, offer, serve, method, refused=refused, missing=missing)
    loss, measured = _loss(question, engine, offer, method)
    sees = expected(offer, question.shape, question.roofs, question.asked, loss, _read_before(question, engine, offer))
    return Row(engine, offer, serve, method, sees, None, _too_large(sees, question.roofs, offer), missing, measured)


def _serve(engine: str, offer: Offer, max_tokens: int) -> ServingSpec:
    """The recipe's words for it."""
    kind = CompileSpec if issubclass(RUNTIMES[engine].spec, CompileSpec) else ExportSpec
    return kind.of(engine=engine, max_tokens=max_tokens, **offer.keys)


def methods(question: Question, offer: Offer) -> list[QuantizeSpec]:
    """Ways to the grid, that of the least expected loss first; of those that are level with it the earlier in the catalog."""
    grid = str(offer.grid)
    losses = {name: QUANTIZERS[name].losses[grid] for name in QUANTIZERS if grid in QUANTIZERS[name].losses}
    least = min(losses.values(), default=0.0)
    ordered = _soon(question, sorted(losses, key=lambda name: max(losses[name] - least, LEVEL)))
    head = None if question.task == "fill-mask" else offer.head
    mixed = {"mixed": {"grid": offer.mixed, "budget": question.max_loss or 0.01}} if offer.mixed else {}
    return [QuantizeSpec.of(method=name, grid=grid, head=head, **mixed) for name in ordered]


def _soon(question: Question, names: list[str]) -> list[str]:
    """Without those that take long, and many times as long as others that read text too."""
    operations = {name: QuantizeSpec.of(method=name).operations(question.facts.size) for name in names}
    least = min((one for one in operations.values() if one), default=0.0)
    allowed = max(LONG_S * question.roofs.flops.get("float32", 0.0) * REACHED, MANY * least)
    return [name for name in names if operations[name] <= allowed]


def _refusal(question: Question, quantize: QuantizeSpec | None, serve: ServingSpec) -> str | None:
    chosen = Chosen(question.task, None, None, quantize, serve, question.machine, question.roofs.device, question.facts)
    return chosen.obstacle()


def _loss(question: Question, engine: str, offer: Offer, method: QuantizeSpec | None) -> tuple[float, bool]:
    """Of the rounded weights, and whether it was measured on this checkpoint (then the engine's part is in it)."""
    found = None if offer.mixed else question.before.losses.get(_key(question, engine, offer))
    if found is not None:
        return found - offer.loss, True
    if method is None or offer.grid is None:
        return 0.0, False
    if offer.mixed:
        return MIXED_LOSS * (question.max_loss or 0.01), False
    return QUANTIZERS[method.method].losses[offer.grid], False


def _read_before(question: Question, engine: str, offer: Offer) -> float | None:
    """Bytes per second that were measured here; of mixed precision, which lies on the same grid, nothing tells."""
    body, head, _ = bytes_of(offer, question.shape)
    return question.before.speed(_key(question, engine, offer), body + head) if body + head and not offer.mixed else None


def _key(question: Question, engine: str, offer: Offer) -> Key:
    serve = _serve(engine, offer, question.max_tokens).model_dump()  # as a recipe is kept, with what is nowhere said
    return engine, computes(serve), offer.grid, question.roofs.device


def _too_large(sees: Expected, roofs: Roofs, offer: Offer) -> str | None:
    """Why a device does not hold it, with what it is made of."""
    if sees.fits(roofs):
        return None
    each = f" on each of {offer.parts} GPUs" if offer.parts > 1 else ""
    parts = f"weights {gib(sees.weights_bytes)}, cache {gib(sees.cache_bytes)}, the rest {gib(sees.other_bytes)}"
    there = f"{gib(roofs.memory_bytes)}, of which {percent(USABLE).lstrip('+')} may be filled"
    return f"takes {gib(sees.memory_bytes)}{each} ({parts}), and there are {there}"


def bits_of(row: Row) -> int:
    """Bits of a weight in the blocks."""
    return grid_named(row.offer.grid).bits if row.offer.grid else round(8 * row.offer.width)
