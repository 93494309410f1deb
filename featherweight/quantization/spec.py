"""What a recipe says of quantization, and of the scan that mixed precision asks for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from featherweight.grid import grid_named
from featherweight.spec import GridName, Positive, SequenceLength, Spec


class MixedSpec(Spec):
    """The most sensitive matrices on a finer grid: as few of them as hold the predicted loss of quality to `budget` (a share).

    A scan rounds each matrix alone, on `samples` blocks of calibration text.
    """

    grid: GridName = "int8-g32"
    budget: float = Field(default=0.01, gt=0)
    samples: Positive = 16


class SensitivitySpec(Spec):
    """The scan behind `quantize.mixed`: the grids of body and head, and the finer one."""

    grid: GridName
    head: GridName | None
    finer: GridName
    scale: Literal["absmax", "mse"]
    samples: Positive
    sequence: SequenceLength


QAT_KEYS = ("steps", "batch", "learning_rate", "distill", "start", "generated_tokens")


class QuantizeSpec(Spec):
    """Weights moved to a grid. `head` is the grid of the embedding and the output head; null leaves both in float.

    smooth: channels scaled against each other before the method rounds. The methods smoothquant and awq are rtn with it.
    scale: steps that hold the largest weight of a group, or those of least squared error (clipping a few).
    start: the rounding that QAT begins from.
    generated_tokens: text that the checkpoint itself writes for QAT to train on, beside the recipe's.
    mixed: keeps the most sensitive matrices on a finer grid, whatever the method.
    """

    method: Literal["rtn", "gptq", "smoothquant", "awq", "qat"] = "rtn"
    smooth: Literal["none", "smoothquant", "awq"] = "none"
    grid: GridName = "int8"
    head: GridName | None = "int8"
    samples: Positive = 64
    sequence: SequenceLength = 128
    steps: Positive = 100
    batch: Positive = 8
    learning_rate: float = Field(default=1e-5, gt=0)
    distill: bool = True
    scale: Literal["absmax", "mse"] = "absmax"
    start: Literal["rtn", "gptq"] = "gptq"
    generated_tokens: int = Field(default=0, ge=0)
    mixed: MixedSpec | None = None

    @property
    def unread(self) -> dict[str, str]:
        return {} if self.method == "qat" else dict.fromkeys(QAT_KEYS, f"with method {self.method}")

    @property
    def sensitivity(self) -> SensitivitySpec | None:
        """The scan that `mixed` asks for."""
        if self.mixed is None:
            return None
        given = self.model_dump(include={"grid", "head", "scale", "sequence"})
        return SensitivitySpec(finer=self.mixed.grid, samples=self.mixed.samples, **given)

    @model_validator(mode="after")
    def _smooth_once(self) -> QuantizeSpec:
        if self.method in ("smoothquant", "awq") and self.smooth not in ("none", self.method):
            raise ValueError(f"method {self.method} smooths already; for another smoothing take method rtn, gptq or qat")
        return self

    @model_validator(mode="after")
    def _qat_on_integers(self) -> QuantizeSpec:
        names = [self.grid, self.head, self.mixed and self.mixed.grid]
        if self.method == "qat" and any(grid_named(name).kind == "float" for name in names if name):
            raise ValueError("qat trains on integer grids; for fp8 take gptq, awq or rtn")
        return self

    @model_validator(mode="after")
    def _mixed_is_finer(self) -> QuantizeSpec:
        if self.mixed is not None and grid_named(self.mixed.grid).fineness <= grid_named(self.grid).fineness:
            raise ValueError(f"mixed.grid {self.mixed.grid} is no finer than grid {self.grid}; give a finer one")
        return self
