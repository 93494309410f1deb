"""Where measurement overruled advice: what a composed recipe was expected to come to, beside what it came to."""

from __future__ import annotations

import math
from collections.abc import Mapping

from featherweight.measure.figures import rate
from featherweight.report.result import OptimizationResult, VariantRow


def advice_line(result: OptimizationResult, expected: Mapping[str, float]) -> str:
    """One line; empty for a recipe without advice, or where nothing was measured.

    expected: new tokens per second at batch 1 by variant, what was to win first.
    """
    first = next(iter(expected), None)
    best = _best(result, expected)
    if first is None or best is None:
        return ""
    if best.name == first:
        return f"measurement agreed with the advice: {_figures(best, expected)}"
    other = result.row(first)
    fate = f"{_figures(other, expected)}, {other.reason or other.status}" if other else "it was not run"
    return f"measurement overruled the advice: it expected {first} first ({fate}); first is {_figures(best, expected)}"


def _best(result: OptimizationResult, expected: Mapping[str, float]) -> VariantRow | None:
    """The winner, or where the baseline stays, the fastest of what was advised."""
    winner = result.row(result.winner)
    if winner is not None and winner.name in expected:
        return winner
    rows = [row for row in result.measured if row.name in expected and math.isfinite(row.get("tokens_per_s_1"))]
    return max(rows, key=lambda row: row.get("tokens_per_s_1"), default=None)


def _figures(row: VariantRow, expected: Mapping[str, float]) -> str:
    wanted = expected.get(row.name, math.nan)
    return f"{row.name}, {rate(wanted)} tokens/s expected and {rate(row.get('tokens_per_s_1'))} measured at batch 1"
