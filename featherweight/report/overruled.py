"""Where measurement overruled advice: what a composed recipe was expected to come to, beside what it came to."""

from __future__ import annotations

import math
from collections.abc import Mapping

from featherweight.measure.figures import rate
from featherweight.measure.goals import judged_batch
from featherweight.report.result import MEASURED, OptimizationResult, VariantRow

NEAR = 2.0
"""A speed within this factor of what was expected is what the advice said."""


def advice_line(result: OptimizationResult, expected: Mapping[str, float]) -> str:
    """One line; empty for a recipe without advice.

    expected: new tokens per second at the objective's batch by variant, what was to win first.
    """
    first = next(iter(expected), None)
    if first is None:
        return ""
    batch = judged_batch(result.objective, ())
    if result.winner == first:
        row = result.row(first)
        agreed = (
            "agreed with the advice" if _near(row, expected, batch) else "chose what the advice expected first, at another speed"
        )
        return f"measurement {agreed}: {_figures(row, expected, batch)}"
    told = f"measurement overruled the advice: it expected {first} first ({_fate(result.row(first), expected, batch)})"
    if result.winner in expected:
        return f"{told}; first is {_figures(result.row(result.winner), expected, batch)}"
    return f"{told}, and nothing that it advised keeps the constraints"


def _fate(row: VariantRow | None, expected: Mapping[str, float], batch: int) -> str:
    """What became of what was to win."""
    if row is None:
        return "it was not run"
    return f"{_figures(row, expected, batch)}, {row.reason}" if row.status in MEASURED else f"{row.status}: {row.reason}"


def _near(row: VariantRow | None, expected: Mapping[str, float], batch: int) -> bool:
    assert row is not None
    wanted, found = expected[row.name], row.get(f"tokens_per_s_{batch}")
    return max(wanted, found) <= NEAR * min(wanted, found)


def _figures(row: VariantRow | None, expected: Mapping[str, float], batch: int) -> str:
    """Of a variant that was measured."""
    assert row is not None
    wanted, found = rate(expected.get(row.name, math.nan)), rate(row.get(f"tokens_per_s_{batch}"))
    return f"{row.name}, {wanted} tokens/s expected and {found} measured at batch {batch}"
