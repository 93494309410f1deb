"""What a recipe says of quantization, whatever the method, and of the scan that mixed precision asks for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Self

from pydantic import Field, model_validator

from featherweight.errors import RecipeError
from featherweight.grid import grid_named
from featherweight.model.parent import Parent, experts_refusal, linear_refusal
from featherweight.quantization.catalog import DEFAULT, QUANTIZERS
from featherweight.spec import HEADED, GridName, ModelSize, NamedSpec, Positive, SequenceLength, Spec

NONE = "none"
"""No smoothing."""
PLAIN, IMATRIX = "absmax", "imatrix"
"""Scales that are chosen without a search, and by a search that reads text."""


class MixedSpec(Spec):
    """The most sensitive matrices on a finer grid: those that hold the predicted loss of quality to `budget` (a share) with the
    fewest bits, or, where `bits` per weight are given (of all matrices, scales included), lose least with those.

    A scan rounds each matrix alone, on `samples` blocks of calibration text.
    """

    quiet = frozenset({"bits"})

    grid: GridName = "int8-g32"
    budget: float = Field(default=0.01, gt=0)
    bits: float | None = Field(default=None, gt=0)
    samples: Positive = 16

    @property
    def unread(self) -> dict[str, str]:
        return {} if self.bits is None else {"budget": "where bits are given"}


class SensitivitySpec(Spec):
    """The scan behind `quantize.mixed`: the grids of body and head, and the finer one."""

    grid: GridName
    head: GridName | None
    finer: GridName
    scale: Literal["absmax", "mse"]
    samples: Positive
    sequence: SequenceLength

    def operations(self, size: ModelSize) -> float:
        """The model is run once in float, and once for each of its matrices."""
        return (1 + size.matrices) * 2.0 * size.parameters * self.samples * self.sequence


class QuantizeSpec(NamedSpec):
    """Weights moved to a grid. `head` is the grid of the embedding and the output head; null leaves both in float.

    The keys that every method reads; a method with keys of its own adds them in its file.
    smooth: channels scaled against each other before the method rounds, by a method that smooths ('none': not at all). Such a
        method itself is rtn behind its own smoothing.
    scale: steps that hold the largest weight of a group, or those of least squared error (clipping a few), each column's error
        weighed by what it carries on the calibration text for imatrix.
    mixed: keeps the most sensitive matrices on a finer grid, whatever the method.
    """

    named_by = "method"

    method: str = DEFAULT
    smooth: str = NONE
    grid: GridName = "int8"
    head: GridName | None = "int8"
    samples: Positive = 64
    sequence: SequenceLength = 128
    scale: Literal["absmax", "mse", "imatrix"] = "absmax"
    mixed: MixedSpec | None = None

    @classmethod
    def kind(cls, name: str | None) -> type[QuantizeSpec]:
        try:
            return QUANTIZERS[name or DEFAULT].spec
        except RecipeError as error:
            raise ValueError(str(error)) from error

    @classmethod
    def kinds(cls) -> Collection[type[QuantizeSpec]]:
        return [QUANTIZERS[name].spec for name in QUANTIZERS]

    @property
    def together(self) -> int:
        """How many processes compute it together."""
        return 1

    @property
    def grids(self) -> list[GridName]:
        """Every grid that weights are to lie on."""
        return [name for name in (self.grid, self.head, self.mixed and self.mixed.grid) if name]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that the result is made by, as the catalog names them: this one, and what smooths before it."""
        return (self.method, *(() if self.smooth in (NONE, self.method) else (self.smooth,)))

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(QUANTIZERS.reference(name) for name in self.methods)

    def refusal(self, parent: Parent) -> str | None:
        """Why this cannot be done to `parent`, in one line; None where it can."""
        if self.mixed is not None and parent.task in HEADED:
            return f"{parent.task} + mixed: the scan that it asks for measures the loss of a text; leave mixed out"
        asked = (QUANTIZERS[name].refusal(self, parent) for name in self.methods)
        first = next((reason for reason in asked if reason), None)
        return first or self._linear_refusal(parent) or experts_refusal(parent.facts)

    def _linear_refusal(self, parent: Parent) -> str | None:
        """What walks through the layers with llm-compressor, or trains them, knows Linear alone; so does the scan."""
        walking = self.smooth if self.method == DEFAULT else self.method
        what = walking if walking != NONE else "sensitivity" if self.mixed else None
        return linear_refusal(what, parent) if what else None

    @property
    def calibrated(self) -> bool:
        """Whether the calibration text shapes the result."""
        return self.methods != (DEFAULT,) or self.scale == IMATRIX

    def operations(self, size: ModelSize) -> float:
        seen = 2.0 * size.parameters * self.samples * self.sequence if self.scale == IMATRIX else 0.0
        chosen = [QUANTIZERS[name] for name in self.methods]
        return seen + sum(one.operations(self, size.in_blocks if one.in_blocks else size.parameters) for one in chosen)

    @property
    def sensitivity(self) -> SensitivitySpec | None:
        """The scan that `mixed` asks for; its scales weigh all errors alike."""
        if self.mixed is None:
            return None
        given = self.model_dump(include={"grid", "head", "sequence"}) | {"scale": "absmax" if self.scale == PLAIN else "mse"}
        return SensitivitySpec(finer=self.mixed.grid, samples=self.mixed.samples, **given)

    @model_validator(mode="after")
    def _smooth_once(self) -> Self:
        smoothers = [name for name in QUANTIZERS if QUANTIZERS[name].smooth] if self.smooth != NONE else []
        if self.smooth not in (NONE, *smoothers):
            raise ValueError(f"smooth {self.smooth}: no method that smooths; known: {', '.join((NONE, *smoothers))}")
        if self.method in smoothers and self.smooth != self.method:
            others = ", ".join(name for name in QUANTIZERS if name not in smoothers)
            raise ValueError(f"method {self.method} smooths already; for another smoothing take another method: {others}")
        return self

    @model_validator(mode="after")
    def _mixed_is_finer(self) -> Self:
        if self.mixed is not None and grid_named(self.mixed.grid).fineness <= grid_named(self.grid).fineness:
            raise ValueError(f"mixed.grid {self.mixed.grid} is no finer than grid {self.grid}; give a finer one")
        return self
