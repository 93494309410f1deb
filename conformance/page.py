"""The matrix as a page: counts, a row a checkpoint, and a line for each reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime

from conformance.cell import FLOAT, INT8, LOAD, NEW, QUANTIZE, TOKENS
from conformance.outcome import KINDS, Kind, Matrix, Outcome, versions
from conformance.tiny import Case

MARKS: dict[Kind, str] = {
    "exact": "=",
    "within bound": "≈",
    "refused": "r",
    "not offered": "–",
    "not run": "·",
    "defect": "**!**",
}
HEAD = """# What each engine serves

Every model type of text that transformers opens, in tiny and with random weights, and the traits that no default shows, through
every engine: loaded, quantized to int8 per row, served from float32 and from int8. Held to transformers' eager float32 (SDPA where
eager is not the model's) are log-probabilities up to {tokens} tokens, round every window and rotary edge, and texts of {new} tokens
after three prompts, with two ends of text in generation_config.json. (PyTorch's engines that round activations are held to it with
its activations rounded by the same ranges, and their weights to it as it is.) Made by `make conformance` on {date} with
{versions}.

`=` exact: within 0.001 nats, the order of float additions · `≈` within the bound of what the engine rounds · `r` refused in one
line, whose reason stands below · `–` not offered: the engine does not hold the task or the grid, whatever the checkpoint ·
`·` not run

What is refused "before work" the plan knows from the checkpoint's files. What is refused "by the gate" only its numbers tell: the
export is compared with PyTorch before it is measured, and not registered.

"""


def page(matrix: Matrix, cases: list[Case], columns: list[str]) -> str:
    """Markdown of all that `matrix` knows of `cases`."""
    cases, absent = [case for case in cases if case.name in matrix.cells], [case for case in cases if case.name not in matrix.cells]
    told = ", ".join(f"{name} {number}" for name, number in versions().items())
    head = HEAD.format(tokens=TOKENS, new=NEW, date=datetime.now(UTC).date().isoformat(), versions=told)
    parts = [
        head,
        _older(matrix, cases, columns),
        _counts(matrix, cases, columns),
        _rows(matrix, cases, columns),
        _reasons(matrix, cases, columns),
        _absent(absent),
    ]
    return "\n".join(parts)


def _outcome(matrix: Matrix, case: Case, column: str) -> Outcome:
    return matrix.get(case.name, column) or Outcome("not run")


def _absent(cases: list[Case]) -> str:
    """The rows that were not run at all, by the engines that name their model types."""
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for case in cases:
        rows[case.engines].append(case.name)
    lines = [f"- which {', '.join(engines)} name{'s' * (len(engines) == 1)}: {'; '.join(names)}" for engines, names in rows.items()]
    return "\n".join([f"## Rows not run ({len(cases)})", "", *sorted(lines), ""]) if lines else ""


def _older(matrix: Matrix, cases: list[Case], columns: list[str]) -> str:
    """How long the cells took, and how many of them were found with other code than this, by column."""
    found = [(column, case.name) for column in columns for case in cases if matrix.get(case.name, column)]
    outcomes = [_outcome(matrix, case, column) for case in cases for column in columns]
    spent, waited = sum(one.cpu_seconds for one in outcomes) / 60, sum(one.seconds for one in outcomes) / 60
    older = Counter(column for column, name in found if not matrix.is_current(name, column))
    told = f"{sum(older.values())} of them found before the last change of the code that makes them ({_listed(older)})"
    return f"{len(found)} cells, {waited:.0f} minutes by the clock, {spent:.0f} of computing where it was counted" + (
        f"; {told}.\n" if older else ".\n"
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _counts(matrix: Matrix, cases: list[Case], columns: list[str]) -> str:
    lines = ["| | " + " | ".join(KINDS) + " |", "|---|" + "---:|" * len(KINDS)]
    total = dict.fromkeys(KINDS, 0)
    for column in columns:
        counts = {kind: sum(_outcome(matrix, case, column).kind == kind for case in cases) for kind in KINDS}
        total = {kind: total[kind] + counts[kind] for kind in KINDS}
        lines.append(f"| {column} | " + " | ".join(str(counts[kind]) for kind in KINDS) + " |")
    return "\n".join([*lines, "| **all** | " + " | ".join(f"**{total[kind]}**" for kind in KINDS) + " |", ""])


def _rows(matrix: Matrix, cases: list[Case], columns: list[str]) -> str:
    """An engine a column, its mark from float32 before that from int8."""
    engines = list(dict.fromkeys(column.rpartition(" ")[0] for column in columns if column not in (LOAD, QUANTIZE)))
    lines = ["| checkpoint | load | int8 | " + " | ".join(engines) + " |", "|---|" + ":-:|" * (2 + len(engines))]
    for case in cases:
        both = [" ".join(MARKS[_outcome(matrix, case, f"{engine} {form}").kind] for form in (FLOAT, INT8)) for engine in engines]
        first = [MARKS[_outcome(matrix, case, column).kind] for column in (LOAD, QUANTIZE)]
        lines.append(f"| {case.name} | " + " | ".join([*first, *both]) + " |")
    return "\n".join([*lines, ""])


def _reasons(matrix: Matrix, cases: list[Case], columns: list[str]) -> str:
    """Each reason once, with whom it concerns."""
    found: dict[tuple[Kind, str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        for column in columns:
            outcome = _outcome(matrix, case, column)
            if outcome.reason:
                found[outcome.kind, outcome.moment, outcome.reason][column].append(case.name)
    parts = []
    for kind in ("defect", "refused", "not offered", "not run"):
        lines = [
            f"- {_who(where, len(cases))}: {reason}{_moment(moment)}" for (k, moment, reason), where in found.items() if k == kind
        ]
        parts += [f"## {kind.capitalize()}", "", *sorted(lines), ""] if lines else []
    return "\n".join(parts)


def _moment(moment: str) -> str:
    return f" ({moment})" if moment else ""


def _who(where: dict[str, list[str]], every: int) -> str:
    return "; ".join(f"{column}, {'all' if len(names) == every else ', '.join(names)}" for column, names in where.items())
