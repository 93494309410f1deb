"""The report: one HTML file with the result of an optimization, which opens offline and asks the network for nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featherweight.measure.figures import MISSING, mebibytes, percent, rate, times
from featherweight.measure.goals import bound_shown
from featherweight.report.lineage_picture import lineage_picture, winner_path
from featherweight.report.pareto_chart import chart_points, engine_index, pareto_chart
from featherweight.report.rendering import render_template
from featherweight.report.result import OptimizationResult, Status, VariantRow, ranked
from featherweight.report.tables import columns


def render_report(result: OptimizationResult, path: Path) -> None:
    """Write the report. Its charts are SVG, its script sorts the table and shows hints; all that users named is escaped."""
    page = render_template("report.html.j2", **_context(result))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _context(result: OptimizationResult) -> dict[str, Any]:
    """What the template shows, in the order of its sections."""
    winner = result.row(result.winner)
    return {
        "result": result,
        "winner": winner,
        "cards": _cards(result, winner),
        "charts": [_chart(result, batch) for batch in result.batch_sizes if chart_points(result, batch)],
        "engines": [(engine, engine_index(result, engine)) for engine in dict.fromkeys(row.engine for row in ranked(result))],
        "table": _table(result),
        "losers": [row for row in ranked(result) if row.status == "loser"],
        "unmeasured": [row for row in result.variants if row.status in ("failed", "skipped")],
        "ruled_out": _by_reason(result, "ruled-out"),
        "passed_over": _by_reason(result, "passed-over"),
        "lineage": lineage_picture(result),
        "won": winner_path(result.nodes, winner.stages if winner else ()),
        "facts": _facts(result),
        "duration": _duration(result.seconds),
        "number": _number,
    }


def _cards(result: OptimizationResult, winner: VariantRow | None) -> list[tuple[str, str, str]]:
    """(heading, figure, small print) of the winner's main figures."""
    if winner is None:
        return []
    cards = []
    for batch in result.batch_sizes:
        low, high = winner.get(f"speedup_{batch}_low"), winner.get(f"speedup_{batch}_high")
        interval = f"95 % CI {times(low)} to {times(high)}, " if math.isfinite(low) and math.isfinite(high) else ""
        small = f"{interval}{rate(winner.get(f'tokens_per_s_{batch}'))} tokens/s"
        cards.append((f"speed, batch {batch}", times(winner.get(f"speedup_{batch}")), small))
    cards.append((f"change of {result.quality}", percent(winner.get("quality_change")), _quality_note(winner)))
    base = result.baseline.get("size_bytes") if result.baseline else math.nan
    cards.append(("size", mebibytes(winner.get("size_bytes")), f"baseline {mebibytes(base)}"))
    return [card for card in cards if card[1] != MISSING]


def _quality_note(winner: VariantRow) -> str:
    interval = winner.quality_loss.removeprefix(percent(winner.get("quality_change"))).strip(" []")
    sign = "+ is worse" if winner.get("quality_change") > 0 else "− is better"
    return f"95 % CI {interval.replace(',', ' to')} %; {sign}" if interval else sign


def _chart(result: OptimizationResult, batch: int) -> dict[str, Any]:
    """One batch size's chart, for wide and for narrow screens."""
    return {
        "batch": batch,
        "wide": pareto_chart(result, batch, 920, 500),
        "narrow": pareto_chart(result, batch, 350, 400, full_names=False),
        "front": [row.name for row in result.pareto_front(batch)],
    }


def _table(result: OptimizationResult) -> dict[str, Any]:
    """Headings and rows; each cell is its text and its sort key."""
    shown = columns(result)
    rows = [(row, [(column.text(row), _sort_key(column.order(row))) for column in shown]) for row in ranked(result)]
    front = {row.name for row in result.pareto_front(result.main_batch)}
    return {"columns": shown, "rows": rows, "front": front}


def _sort_key(value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else ""


def _by_reason(result: OptimizationResult, status: Status) -> dict[str, list[str]]:
    """Names of the variants with this fate, under their reasons."""
    found: dict[str, list[str]] = {}
    for row in result.variants:
        if row.status == status:
            found.setdefault(row.reason, []).append(row.name)
    return found


def _facts(result: OptimizationResult) -> list[tuple[str, Mapping[str, str]]]:
    """Tables of plain facts: (heading, facts)."""
    settings = {
        "objective": result.objective,
        "seed": str(result.seed),
        "started": result.started,
        "took": _duration(result.seconds),
    }
    limits = {name: bound_shown(name, value) for name, value in result.constraints.items() if value is not None}
    tables = [
        ("Objective and constraints", {**settings, **limits}),
        ("Machine", result.machine),
        ("Versions", result.versions),
        ("Runs", result.runs),
    ]
    return [(heading, {name: value for name, value in facts.items() if value}) for heading, facts in tables if facts]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"
