"""Sensitivity: what rounding each matrix alone costs, and which matrices are worth more bits."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from featherweight.errors import IntegrityError, RecipeError, StageError, one_line
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
    def saved(self) -> float:
        """Nats per token that the finer grid saves."""
        return self.divergence - self.finer_divergence

    @property
    def added(self) -> float:
        """Bits that it costs more."""
        return self.weights * (self.finer_bits - self.bits)


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

    def bits_per_weight(self, finer: frozenset[str]) -> float:
        """Storage per weight of all matrices, scales included, with these on the finer grid."""
        bits = sum(one.weights * (one.finer_bits if one.name in finer else one.bits) for one in self.matrices)
        return bits / sum(one.weights for one in self.matrices)

    def finer_for(self, budget: float) -> frozenset[str]:
        """The matrices to keep on the finer grid so that a predicted loss of at most `budget` takes the fewest bits.

        Raises RecipeError where even all of them are not enough.
        """
        every = frozenset(one.name for one in self.matrices)
        if self.predicted_loss(every) > budget:
            raise RecipeError(
                f"quantize.mixed: with every matrix on {self.finer} the predicted loss is {self.predicted_loss(every):.2%}, above "
                f"the budget of {budget:.2%}; raise the budget or take a finer grid"
            )
        asked = (self.predicted_loss(frozenset()) - budget) * self.loss
        if asked <= 0:
            return frozenset()
        return self._chosen([one.added for one in self.matrices], [one.saved / asked for one in self.matrices], least=1)

    def finer_within(self, bits: float) -> frozenset[str]:
        """The matrices to keep on the finer grid so that at most `bits` per weight have the least predicted loss.

        Raises RecipeError where none can be.
        """
        least, size = self.bits_per_weight(frozenset()), sum(one.weights for one in self.matrices)
        if least > bits:
            raise RecipeError(
                f"quantize.mixed: with every matrix on {self.grid} the weights take {least:.4g} bits each, scales included, above "
                f"the budget of {bits:.4g}; raise the budget or take a coarser grid"
            )
        room = max((bits - least) * size, 1.0)
        return self._chosen([-one.saved for one in self.matrices], [one.added / room for one in self.matrices], most=1)

    def _chosen(self, costs: list[float], row: list[float], least: float = -math.inf, most: float = math.inf) -> frozenset[str]:
        """The matrices of the least sum of `costs` whose sum of `row` is within the bounds, to a millionth, by an integer program.

        There are some, as the callers see to.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        scale = sum(map(abs, costs)) or 1.0
        shares = [cost / scale for cost in costs]
        found = milp(shares, integrality=[1] * len(row), bounds=Bounds(0, 1), constraints=LinearConstraint([row], least, most))
        if found.x is None:
            raise StageError(f"quantize.mixed: no matrices were found that keep to the budget ({one_line(found.message)})")
        return frozenset(one.name for one, taken in zip(self.matrices, found.x, strict=True) if taken > 0.5)

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
