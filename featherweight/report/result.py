"""The result of an optimization: every variant with its numbers and its fate, how it was made, and the tables that show it.

Metrics of a row, by key (N is a batch size). Fractions, seconds, bytes; a key that was not measured is left out.
- `bits_per_byte`, `perplexity` (per token); of encoders that answer by vectors or labels instead `embedding_distance` or
  `cross_entropy` or `score_error`, `rank_agreement`, `label_agreement`, `accuracy` (featherweight/measure/agreement.py);
- `quality_change`, `quality_change_low`, `quality_change_high`: relative change of bits per byte against the baseline, or the
  difference of those losses, worse is positive, with the bounds of its 95 % confidence interval;
- `changed_answers`, with `_low` and `_high`: the share of `answers` greedy texts that are not the original's;
- `accuracy_NAME`, `accuracy_change_NAME`, with bounds: in each benchmark, and against the baseline; `accuracy_loss`: the worst;
- `bleu`, `chrf`, `rouge_l`, in points of 100, and `NAME_change` with bounds: of `references` texts; `reference_loss`: the worst;
- `tokens_per_s_N`, `speedup_N`, `speedup_N_low`, `speedup_N_high`: throughput, and its ratio to the baseline's, with bounds;
- `ttft_s_N` with bounds, `inter_token_s_N`, `p50_latency_s_N`, `p95_latency_s_N`, `p99_latency_s_N`: time to first token, between
  tokens, latency of a whole generation; `startup_s`: until it can serve;
- the same of one request with a prompt of N tokens, as `ttft_s_prompt_N` ...; `ttft_speedup_prompt_N` with bounds: how many times
  sooner than the baseline its first token comes;
- `pQ_latency_s_rate_R`, `pQ_ttft_s_rate_R` with bounds, `done_rate_R`, `tokens_per_s_rate_R`: what requests that come at R a second
  wait, the share that is answered; the longest at any rate ends in `_requests`; what has no end is left out;
- `speculation_speedup_N` with bounds, `tokens_per_pass_N`: of a variant with speculation its throughput over that of the same
  without, and what it writes in a pass over a text;
- `joules_per_token_N`: energy of the whole machine, where it is readable;
- `size_bytes`, `peak_memory_bytes`, `parity`: weights on disk, the engine process's peak, and the largest difference of
  log-probabilities between the served variant and its PyTorch source;
- `roofline_1`: share of the measured memory bandwidth (`bandwidth_bytes_s`, at as many threads) that reading weights and cache at
  batch 1 takes (`bytes_per_token`), see featherweight/measure/roofline.py; left out where memory is not the roof;
- `others_cpu_share`: of the processors, what other programs took while it was timed;
- `zero_share`: share of zeros in the matrices that were pruned weight by weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from featherweight.measure.figures import mebibytes, percent, times, with_interval
from featherweight.measure.goals import judged_batch, measured_batches, pareto_front, request_rates, timed_prompts
from featherweight.measure.statistics import Estimate
from featherweight.spec import HEADED, Task

Status = Literal["winner", "loser", "baseline", "failed", "skipped", "passed-over", "ruled-out"]


MEASURED = ("winner", "loser", "baseline")


@dataclass(frozen=True)
class VariantRow:
    """One variant. `stages` are ids of its nodes from the root on; `threads` by batch size, as text; `reason` tells its fate.

    notes: what a reader of its numbers has to know, a sentence each. device: where it was served. attention: by which kernels of
    PyTorch's, empty where the engine has its own.
    """

    name: str
    engine: str
    status: Status
    grid: str | None = None
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    stages: tuple[str, ...] = ()
    threads: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    device: str = ""
    attention: str = ""

    def get(self, key: str) -> float:
        """A metric, NaN where it was not measured."""
        return self.metrics.get(key, math.nan)

    @property
    def quality_loss(self) -> str:
        """The change of quality with its confidence interval, where there is one, as people read it."""
        return with_interval(self.estimate("quality_change"), percent)

    def estimate(self, key: str) -> Estimate:
        """A metric with its confidence interval, NaN where it was not measured."""
        return Estimate(*(self.get(f"{key}{end}") for end in ("", "_low", "_high")))


@dataclass(frozen=True)
class NodeRow:
    """One stage node of the plan and how it ended: 'done', 'cached', 'failed', 'skipped' or 'blocked'; and where it computed."""

    id: str
    stage: str
    label: str
    status: str
    seconds: float = 0.0
    parents: tuple[str, ...] = ()
    digest: str = ""
    run_id: str = ""
    cached: bool = False
    device: str = ""


@dataclass(frozen=True)
class GateRow:
    """One suite of expectations: how many were checked, and those that did not hold, in words."""

    suite: str
    evaluated: int
    failed_critical: tuple[str, ...] = ()
    failed_warning: tuple[str, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizationResult:
    """Everything that the report, the terminal and the README show of one optimization."""

    name: str
    objective: str
    winner: str | None
    variants: tuple[VariantRow, ...]
    constraints: Mapping[str, float] = field(default_factory=dict)
    nodes: tuple[NodeRow, ...] = ()
    gates: tuple[GateRow, ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    runs: Mapping[str, str] = field(default_factory=dict)
    recipe: str = ""
    registered: str = ""
    started: str = ""
    seconds: float = 0.0
    seed: int = 0
    report: Path | None = None
    task: Task = "text-generation"
    unserved: str = ""
    waits: str = ""
    best_found: str = ""
    advice: str = ""

    def row(self, name: str | None) -> VariantRow | None:
        """The variant of that name."""
        return next((row for row in self.variants if row.name == name), None)

    @property
    def baseline(self) -> VariantRow | None:
        """The untouched checkpoint's row."""
        return next((row for row in self.variants if row.status == "baseline"), None)

    @property
    def measured(self) -> list[VariantRow]:
        """Rows with numbers."""
        return [row for row in self.variants if row.status in MEASURED]

    @property
    def nothing_made(self) -> bool:
        """Whether no variant got as far as numbers: there is nothing to choose from."""
        return all(row.status == "baseline" for row in self.measured)

    @property
    def batch_sizes(self) -> list[int]:
        """Batch sizes that a speed-up was measured at."""
        return measured_batches(self._metric_names())

    @property
    def main_batch(self) -> int:
        """The batch size that speed is judged at."""
        return judged_batch(self.objective, self._metric_names())

    @property
    def prompt_lengths(self) -> list[int]:
        """Other lengths of prompts that were timed."""
        return timed_prompts(self._metric_names())

    @property
    def request_rates(self) -> list[str]:
        """The rates that requests came at, as the names of the figures have them."""
        return request_rates(self._metric_names())

    def _metric_names(self) -> Iterator[str]:
        return chain.from_iterable(row.metrics for row in self.variants)

    def pareto_front(self, batch: int) -> list[VariantRow]:
        """Rows that no other beats in both speed at that batch size and quality, fastest first."""
        rows = {row.name: row for row in self.measured}
        return [rows[name] for name in pareto_front({name: row.metrics for name, row in rows.items()}, batch)]

    @property
    def notes(self) -> dict[str, tuple[str, ...]]:
        """Every note, and the measured variants that it is about, in the tables' order."""
        rows = ranked(self)
        texts = dict.fromkeys(text for row in rows for text in row.notes)
        return {text: tuple(row.name for row in rows if text in row.notes) for text in texts}

    @property
    def note_lines(self) -> list[str]:
        """The notes for a terminal, and what became of advice."""
        notes = [f"{', '.join(names)}: {text}" for text, names in self.notes.items()]
        return [*notes, *filter(None, (self.advice, self.best_found))]

    @property
    def quality(self) -> str:
        """What the change of quality is one of."""
        names = {"feature-extraction": "embedding distance"} | dict.fromkeys(HEADED[1:], "cross-entropy")
        of_numbers = "score_error" in set(self._metric_names())
        return "score error" if of_numbers else names.get(self.task, "bits per byte")

    def headline(self) -> str:
        """The outcome in one sentence."""
        winner, tried = self.row(self.winner), len(self.measured) - 1
        if self.nothing_made:
            return "No variant was made: every one failed or was skipped; the baseline stays."
        if winner is None:
            return f"No variant kept every constraint ({tried} measured); the baseline stays."
        parts = [f"{times(winner.get(f'speedup_{batch}'))} the baseline's speed at batch {batch}" for batch in self.batch_sizes]
        parts.append(f"{mebibytes(winner.get('size_bytes'))}{self._smaller(winner)}")
        parts.append(f"{self.quality} {winner.quality_loss}")
        return f"{winner.name}: {', '.join(parts)}."

    def _smaller(self, row: VariantRow) -> str:
        ratio = self.baseline.get("size_bytes") / row.get("size_bytes") if self.baseline else math.nan
        return f" ({ratio:.1f}x smaller)" if math.isfinite(ratio) and ratio > 1 else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a number that is not finite becomes null."""
        return _finite(asdict(self))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> OptimizationResult:
        """The inverse of `to_dict`."""
        rows = {"variants": VariantRow, "nodes": NodeRow, "gates": GateRow}
        parts = {key: tuple(_row(kind, row) for row in tree[key]) for key, kind in rows.items()}
        return cls(**{**tree, **parts, "report": Path(tree["report"]) if tree.get("report") else None})


def _finite(value: Any) -> Any:
    """The same tree with tuples as lists, paths as text, and NaN or infinity as None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(kind: Callable[..., Any], tree: Mapping[str, Any]) -> Any:
    """One row from its JSON: lists become tuples, a null metric NaN."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}
    for key in ("metrics", "facts"):
        if key in values:
            values[key] = {name: math.nan if number is None else number for name, number in values[key].items()}
    return kind(**values)


def gate_rows(validation: Path) -> tuple[GateRow, ...]:
    """The suites of a `validation.json` or `metrics.json` that a data gate wrote."""
    rows = []
    for suite in json.loads(validation.read_text())["suites"]:
        texts = [(found["critical"], _finding(found)) for found in suite["findings"]]
        failed = {kind: tuple(text for critical, text in texts if critical == kind) for kind in (True, False)}
        rows.append(GateRow(suite["name"], suite["evaluated"], failed[True], failed[False], suite["facts"]))
    return tuple(rows)


def _finding(found: Mapping[str, Any]) -> str:
    more = f" and {found['count'] - len(found['rows'])} more" if found["count"] > len(found["rows"]) else ""
    return f"{found['text']}: {', '.join(found['rows'])}{more}" if found["rows"] else found["text"]


def ranked(result: OptimizationResult) -> list[VariantRow]:
    """Measured rows: the winner, then the others by the objective's speed, the baseline last."""
    key = f"speedup_{result.main_batch}"
    place = {"winner": 0, "loser": 1, "baseline": 2}
    speed = {row.name: row.get(key) if math.isfinite(row.get(key)) else -math.inf for row in result.measured}
    return sorted(result.measured, key=lambda row: (place[row.status], -speed[row.name], row.name))
