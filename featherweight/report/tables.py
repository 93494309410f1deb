"""The tables of a result: for a terminal, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featherweight.measure.figures import MISSING, mebibytes, milliseconds, percent, points, rate, share, times, with_interval
from featherweight.report.result import OptimizationResult, VariantRow, ranked
from featherweight.spec import HEADED, Task
from featherweight.visible import visible

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Column:
    """A column of the tables: its heading, what it means, its text and its sort key for a row; `brief` ones fit a terminal."""

    title: str
    meaning: str
    text: Callable[[VariantRow], str]
    order: Callable[[VariantRow], float]
    brief: bool = False


SCORED: Mapping[Task, str] = {
    "text-generation": "on the held-out text",
    "text2text-generation": "of the held-out targets, given their sources",
    "fill-mask": "of the masked tokens of the held-out text",
    "feature-extraction": "1 - the cosine to the original's vectors of the held-out texts",
    **dict.fromkeys(HEADED[1:], "to the held-out labels, or the original's own, as a share of a guess's"),
}
"""What the quality of a model for each task is about."""


CHANGED = "share of greedy texts that are not the original's, letter for letter"
NEAR = {
    "bleu": ("BLEU", "corpus BLEU of greedy texts against the held-out targets, by sacrebleu"),
    "chrf": ("chrF", "corpus chrF of them, by sacrebleu"),
    "rouge_l": ("ROUGE-L", "mean F of ROUGE-L of them, times 100, by rouge-score"),
}
"""Title and meaning of each metric of references."""
RANKS = "Spearman's correlation with the original's scores, or cosines of pairs of texts"


ROOFLINE = (
    "share of the memory bandwidth, measured at as many threads, that reading the weights and the cache for every token takes; "
    "above 100 % the processor's own caches hold the model"
)


def columns(result: OptimizationResult) -> list[Column]:
    """The numeric columns of a result's tables, those left out that no variant has a value for."""
    batches = result.batch_sizes
    scored, counted = SCORED[result.task], "tokens read" if result.task in ("fill-mask", *HEADED) else "new tokens"
    title = f"Δ {result.quality.replace('bits per byte', 'bits/byte')} (95 % CI)"
    found = [_metric(title, f"change of {result.quality} against the baseline", "quality_change", brief=True)]
    for batch in batches:
        at = f"batch {batch}"
        found += [
            _metric(f"speed ×, {at}", "tokens/s over the baseline's", f"speedup_{batch}", times, brief=True),
            _metric(f"tokens/s, {at}", f"{counted} per second, all sequences together", f"tokens_per_s_{batch}", rate, brief=True),
            _metric(f"TTFT, {at}", "time to first token", f"ttft_s_{batch}", milliseconds),
            _metric(f"p50, {at}", "median latency of a generation", f"p50_latency_s_{batch}", milliseconds),
            _metric(
                f"p95, {at}", "95th percentile of the latency", f"p95_latency_s_{batch}", milliseconds, brief=batch == batches[0]
            ),
        ]
    found += [
        _metric("size", "weights on disk", "size_bytes", mebibytes, brief=True),
        _metric("peak memory", "of the serving process, where its weights lie", "peak_memory_bytes", mebibytes, brief=True),
        _metric("host memory", "peak in main memory beside the GPU's", "peak_host_memory_bytes", mebibytes),
        _metric("tensors", "peak of the GPU's memory that PyTorch's own count knows", "peak_tensor_bytes", mebibytes),
        _metric("roofline, batch 1", ROOFLINE, "roofline_1", share),
        _metric("bits/byte", scored, "bits_per_byte", lambda value: _number(value, ".4f")),
        _metric("perplexity", f"per token, {scored}", "perplexity", lambda value: _number(value, ".3f")),
        _metric("embedding distance", scored, "embedding_distance", lambda value: _number(value, ".5f")),
        _metric("cross-entropy", scored, "cross_entropy", lambda value: _number(value, ".4f")),
        _metric("accuracy", "share of the held-out labels that are found", "accuracy", share),
        _metric("same label", "share of answers with the original's likeliest label", "label_agreement", share),
        _bounded("changed answers (95 % CI)", CHANGED, "changed_answers", share),
        *_benchmarks(result),
        *_near_references(),
        _metric("rank agreement", RANKS, "rank_agreement", lambda value: _number(value, ".4f")),
        _metric("parity", "largest difference of log-probabilities to the PyTorch source", "parity", lambda v: _number(v, ".2g")),
        _metric("zeros", "share of zeros in the pruned matrices", "zero_share", share),
        Column("device", "where it was served", _device, lambda row: float(row.device != "cpu"), brief=_on_gpu(result)),
        Column(
            "attention", "PyTorch's kernels for the prompt, and for a step", lambda row: row.attention or MISSING, lambda _: 0.0
        ),
        Column("threads", "found best, per batch size", _threads, lambda row: max(row.threads.values(), default=math.nan)),
    ]
    return [column for column in found if any(column.text(row) != MISSING for row in result.measured)]


def _metric(title: str, meaning: str, key: str, show: Callable[[float], str] | None = None, brief: bool = False) -> Column:
    text = (lambda row: show(row.get(key))) if show else (lambda row: row.quality_loss)
    return Column(title, meaning, text, lambda row: row.get(key), brief)


def _benchmarks(result: OptimizationResult) -> list[Column]:
    """The accuracy in each of the recipe's benchmarks, and its change."""
    names = dict.fromkeys(key for row in result.measured for key in row.metrics if key.startswith("accuracy_change_"))
    tasks = [key.removeprefix("accuracy_change_") for key in names if not key.endswith(("_low", "_high"))]
    shown = []
    for task in tasks:
        shown.append(_metric(task, f"accuracy in {task}", f"accuracy_{task}", share))
        shown.append(
            _bounded(
                f"Δ {task} (95 % CI)", "its accuracy less the baseline's, paired by example", f"accuracy_change_{task}", percent
            )
        )
    return shown


def _near_references() -> list[Column]:
    """How near the texts come to their references, and the change of that."""
    shown = []
    for key, (title, meaning) in NEAR.items():
        shown.append(_metric(title, meaning, key, points))
        shown.append(_bounded(f"Δ {title} (95 % CI)", "its points less the baseline's, paired by text", f"{key}_change", points))
    return shown


def _bounded(title: str, meaning: str, key: str, show: Callable[[float], str]) -> Column:
    """A figure with its confidence interval; one that a recipe asks for by name, and that a terminal shows for that."""
    return Column(title, meaning, lambda row: with_interval(row.estimate(key), show), lambda row: row.get(key), brief=True)


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else MISSING


def _device(row: VariantRow) -> str:
    return row.device or MISSING


def _on_gpu(result: OptimizationResult) -> bool:
    return any(row.device not in ("", "cpu") for row in result.measured)


def _threads(row: VariantRow) -> str:
    counts = [str(row.threads[batch]) for batch in sorted(row.threads, key=int)]
    return MISSING if not counts else counts[0] if len(set(counts)) == 1 else " / ".join(counts)


def terminal_table(result: OptimizationResult) -> Table:
    """The variants as a rich table; failed ones with their reasons, the ruled out only counted."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    shown = [column for column in columns(result) if column.brief]
    ruled_out = sum(row.status == "ruled-out" for row in result.variants)
    caption = f"{ruled_out} combinations ruled out before running" if ruled_out else None
    table = Table(title=escape(visible(result.name)), caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("variant", overflow="fold", min_width=12)
    for column in shown:
        table.add_column(column.title.replace(", ", "\n").replace(" (", "\n("), justify="right", no_wrap=True)
    table.add_column("outcome", overflow="fold", min_width=12)
    styles = {"winner": "bold green", "baseline": "cyan"}
    for row in ranked(result):
        fate = row.status if row.status in styles else row.reason
        cells = [row.name, *(column.text(row) for column in shown), fate]
        table.add_row(*map(Text, map(visible, cells)), style=styles.get(row.status))
    for row in result.variants:
        if row.status in ("failed", "skipped"):
            blanks = [MISSING] * len(shown)
            table.add_row(*map(Text, map(visible, [row.name, *blanks, f"{row.status}: {row.reason}"])), style="dim")
    return table


def markdown_table(result: OptimizationResult) -> str:
    """The measured variants as a table for a README."""
    shown = [column for column in columns(result) if column.brief]
    lines = ["| variant | " + " | ".join(column.title for column in shown) + " |"]
    lines.append("|---|" + "---:|" * len(shown))
    for row in ranked(result):
        mark = "**" if row.status == "winner" else ""
        cells = [f"{mark}{cell}{mark}" for cell in [_escaped(row.name), *(column.text(row) for column in shown)]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return visible(text.replace("\\", "\\\\").replace("\n", " ")).replace("|", "\\|").replace("*", "\\*")
