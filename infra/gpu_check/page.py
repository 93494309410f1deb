"""The table of a check, as a page."""

from __future__ import annotations

from collections.abc import Sequence

from infra.gpu_check.running import Result

SPEEDS = ("speedup_1", "speedup_8", "speedup_64", "tokens_per_s_1", "tokens_per_s_64", "ttft_s_1")


def page(card: str | None, notes: Sequence[str], results: Sequence[Result]) -> str:
    """All results, the failed ones first; and the engines' figures side by side."""
    counts = {state: sum(result.state == state for result in results) for state in ("ok", "failed", "not run")}
    lines = [f"# {card or 'No CUDA here'}", "", ", ".join(f"{count} {state}" for state, count in counts.items()), ""]
    lines += [f"- {note}" for note in notes] + [""]
    lines += _speeds([result for result in results if "evaluate" in result.name and result.figures])
    lines += ["| check | state | s | found |", "|---|---|---|---|"]
    ordered = sorted(results, key=lambda result: ("failed", "ok", "not run").index(result.state))
    lines += [f"| {r.name} | {r.state} | {r.seconds:.0f} | {_cell(r.found)} |" for r in ordered]
    return "\n".join(lines) + "\n"


def _speeds(results: Sequence[Result]) -> list[str]:
    """One line an engine, all its figures of speed and memory by name."""
    if not results:
        return []
    wanted = [key for key in dict.fromkeys(key for r in results for key in r.figures) if _shown(key)]
    head = ["| engine | " + " | ".join(wanted) + " |", "|---" * (len(wanted) + 1) + "|"]
    return head + [f"| {r.name} | " + " | ".join(_figure(r.figures.get(key)) for key in wanted) + " |" for r in results] + [""]


def _shown(key: str) -> bool:
    return key.startswith(("speedup", "tokens_per_s", "ttft", "peak_", "roofline")) and not key.endswith(("_low", "_high"))


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value or "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:300]
