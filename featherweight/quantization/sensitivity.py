"""Sensitivity: what rounding each matrix alone costs, and which matrices are worth more bits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from featherweight.errors import IntegrityError, RecipeError
from featherweight.report.sensitivity_page import MatrixBar, sensitivity_page

FILE = "sensitivity.json"
PAGE = "sensitivity.html"
SHOWN_BUDGETS = (0.005, 0.01, 0.02, 0.05)


@dataclass(frozen=True)
class Matrix:
    """One weight matrix: its size, its bits per weight on either grid, and what rounding it alone costs.

    divergence: KL of the model's predictions with this matrix rounded from those without, nats per token; `finer_divergence` the
    same on the finer grid.
    """

    name: str
    weights: int
    bits: float
    finer_bits: float
    divergence: float
    finer_divergence: float

    @property
    def gain(self) -> float:
        """Nats per token that the finer grid saves, for each bit that it costs more."""
        return (self.divergence - self.finer_divergence) / max(1.0, self.weights * (self.finer_bits - self.bits))


@dataclass(frozen=True)
class Sensitivity:
    """A scan of every matrix of a checkpoint. `loss` is the float model's own, in nats per token."""

    grid: str
    finer: str
    loss: float
    matrices: tuple[Matrix, ...]

    def predicted_loss(self, finer: frozenset[str]) -> float:
        """Relative loss of quality with these matrices on the finer grid: the divergences add up while they are small."""
        parts = (one.finer_divergence if one.name in finer else one.divergence for one in self.matrices)
        return sum(parts) / self.loss

    def finer_for(self, budget: float) -> frozenset[str]:
        """The matrices to keep on the finer grid for a predicted loss of at most `budget`: those that gain most for a bit.

        Raises RecipeError where even all of them are not enough.
        """
        chosen: frozenset[str] = frozenset()
        for one in sorted(self.matrices, key=lambda one: (-one.gain, one.name)):
            if self.predicted_loss(chosen) <= budget:
                break
            chosen |= {one.name}
        if self.predicted_loss(chosen) > budget:
            raise RecipeError(
                f"quantize.mixed: with every matrix on {self.finer} the predicted loss is {self.predicted_loss(chosen):.2%}, above "
                f"the budget of {budget:.2%}; raise the budget or take a finer grid"
            )
        return chosen

    def write(self, folder: Path) -> None:
        """Write the figures, and a page that shows them."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")
        (folder / PAGE).write_text(_page(self), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Sensitivity:
        """What `write` wrote; IntegrityError where there is nothing, or nothing sensible."""
        try:
            tree = json.loads((folder / FILE).read_text())
            return cls(**tree | {"matrices": tuple(Matrix(**one) for one in tree["matrices"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{folder / FILE} is no sensitivity scan ({error}); scan the checkpoint anew") from error


def _page(scan: Sensitivity) -> str:
    bars = [MatrixBar(one.name, one.divergence / scan.loss, one.finer_divergence / scan.loss) for one in scan.matrices]
    budgets = [(f"{budget:.1%}", _bought(scan, budget)) for budget in SHOWN_BUDGETS if scan.matrices]
    return sensitivity_page(scan.grid, scan.finer, bars, budgets)


def _bought(scan: Sensitivity, budget: float) -> str:
    try:
        chosen = scan.finer_for(budget)
    except RecipeError:
        return "not enough"
    share = sum(one.weights for one in scan.matrices if one.name in chosen) / sum(one.weights for one in scan.matrices)
    return f"{len(chosen)} of {len(scan.matrices)}, {share:.0%} of the weights"
