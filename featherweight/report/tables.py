"""The tables of a result: for a terminal, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featherweight.measure.figures import (
    MISSING,
    mebibytes,
    milliseconds,
    percent,
    plain,
    points,
    rate,
    seconds,
    share,
    times,
    with_interval,
)
from featherweight.report.result import OptimizationResult, VariantRow, ranked
from featherweight.spec import HEADED, Task
from featherweight.visible import visible

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

STYLES = {"winner": "bold green", "baseline": "cyan"}


@dataclass(frozen=True)
class Column:
    """A column of the tables: its heading, what it means, its text and its sort key for a row; `brief` ones fit a terminal.

    asked: one that a recipe asks for by name, which a terminal shows in a table below the others'.
    """

    title: str
    meaning: str
    text: Callable[[VariantRow], str]
    order: Callable[[VariantRow], float]
    brief: bool = False
    asked: bool = False


BESIDE = 6
"""So many columns with intervals a terminal has room for beside the names."""
SCORED: Mapping[Task, str] = {
    "text-generation": "on the held-out text",
    "text2text-generation": "of the held-out targets, given their sources",
    "fill-mask": "of the masked tokens of the held-out text",
    "feature-extraction": "1 - the cosine to the original's vectors of the held-out texts",
    **dict.fromkeys(HEADED[1:], "to the held-out labels, or the original's own, as a share of a guess's"),
}
"""What the quality of a model for each task is about."""


SPECULATION = "tokens/s over those of the same without speculation, whose texts are the same"
JOULES = "energy of the whole machine for each new token"
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


SERVED = ", and when it is served"


def columns(result: OptimizationResult) -> list[Column]:
    """The numeric columns of a result's tables, those left out that no variant has a value for."""
    title = f"Δ {result.quality.replace('bits per byte', 'bits/byte')} (95 % CI)"
    found = [
        _metric(title, f"change of {result.quality} against the baseline", "quality_change", brief=True),
        *(column for batch in result.batch_sizes for column in _of_batch(result, batch)),
        *(column for tokens in result.prompt_lengths for column in _long_prompts(tokens)),
        *(column for often in result.request_rates for column in _requests(often)),
        *_costs(),
        *_quality(result),
        *_serving(result),
    ]
    return [column for column in found if any(column.text(row) != MISSING for row in result.measured)]


def _of_batch(result: OptimizationResult, batch: int) -> list[Column]:
    """Generations of so many sequences together."""
    at, counted = f"batch {batch}", "tokens read" if result.task in ("fill-mask", *HEADED) else "new tokens"
    return [
        _metric(f"speed ×, {at}", "tokens/s over the baseline's", f"speedup_{batch}", times, brief=True),
        _metric(f"tokens/s, {at}", f"{counted} per second, all sequences together", f"tokens_per_s_{batch}", rate, brief=True),
        _metric(f"TTFT, {at}", "time to first token", f"ttft_s_{batch}", milliseconds),
        _metric(f"p50, {at}", "median latency of a generation", f"p50_latency_s_{batch}", milliseconds),
        _metric(
            f"p95, {at}",
            "95th percentile of the latency",
            f"p95_latency_s_{batch}",
            milliseconds,
            brief=batch == result.batch_sizes[0],
        ),
        _metric(f"p99, {at}", "99th percentile of the latency", f"p99_latency_s_{batch}", milliseconds),
        _metric(f"between tokens, {at}", "of one sequence, after the first", f"inter_token_s_{batch}", milliseconds),
        _metric(f"J/token, {at}", JOULES, f"joules_per_token_{batch}", plain),
        _bounded(f"speculation ×, {at} (95 % CI)", SPECULATION, f"speculation_speedup_{batch}", times),
        _metric(f"tokens a pass, {at}", "over a text, with what was drafted", f"tokens_per_pass_{batch}", plain),
    ]


def _costs() -> list[Column]:
    """Space, memory, its bandwidth, and the time to start."""
    return [
        _metric("size", "weights on disk", "size_bytes", mebibytes, brief=True),
        _metric("peak memory", "of the serving process, where its weights lie", "peak_memory_bytes", mebibytes, brief=True),
        _metric("start", "until it can serve: its process, its libraries, its weights", "startup_s", seconds),
        _metric("host memory", "peak in main memory beside the GPU's", "peak_host_memory_bytes", mebibytes),
        _metric("tensors", "peak of the GPU's memory that PyTorch's own count knows", "peak_tensor_bytes", mebibytes),
        _metric("roofline, batch 1", ROOFLINE, "roofline_1", share),
    ]


def _quality(result: OptimizationResult) -> list[Column]:
    scored = SCORED[result.task]
    return [
        _metric("bits/byte", scored, "bits_per_byte", lambda value: _number(value, ".4f")),
        _metric("perplexity", f"per token, {scored}", "perplexity", lambda value: _number(value, ".3f")),
        _metric("embedding distance", scored, "embedding_distance", lambda value: _number(value, ".5f")),
        _metric("cross-entropy", scored, "cross_entropy", lambda value: _number(value, ".4f")),
        _metric("score error", scored, "score_error", lambda value: _number(value, ".5f")),
        _metric("accuracy", "share of the held-out labels that are found", "accuracy", share),
        _metric("same label", "share of answers with the original's likeliest label", "label_agreement", share),
        _bounded("changed answers (95 % CI)", CHANGED, "changed_answers", share),
        *_benchmarks(result),
        *_near_references(),
        _metric("rank agreement", RANKS, "rank_agreement", lambda value: _number(value, ".4f")),
        _metric("parity", "largest difference of log-probabilities to the PyTorch source", "parity", lambda v: _number(v, ".2g")),
        _metric("zeros", "share of zeros in the pruned matrices", "zero_share", share),
    ]


def _serving(result: OptimizationResult) -> list[Column]:
    """Where, by which kernels and how many threads it was served."""
    return [
        Column("device", "where it was served", _device, lambda row: float(row.device != "cpu"), brief=_on_gpu(result)),
        Column(
            "attention", "PyTorch's kernels for the prompt, and for a step", lambda row: row.attention or MISSING, lambda _: 0.0
        ),
        _metric("largest batch, requests", f"so many are answered together{SERVED}", "max_batch_requests", plain),
        _metric("batch window, requests", f"so long a batch waits for others{SERVED}", "batch_window_s_requests", milliseconds),
        _metric("threads, requests", f"of the engine under them{SERVED}", "threads_requests", plain),
        Column("threads", "found best, per batch size", _threads, lambda row: max(row.threads.values(), default=math.nan)),
    ]


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


def _long_prompts(tokens: int) -> list[Column]:
    """One request behind a prompt of so many tokens."""
    at, key = f"{tokens} tokens", f"prompt_{tokens}"
    return [
        _bounded(f"TTFT, {at}", f"time to first token behind a prompt of {at} (95 % CI)", f"ttft_s_{key}", milliseconds),
        _bounded(f"TTFT ×, {at}", "how many times sooner than the baseline it comes (95 % CI)", f"ttft_speedup_{key}", times),
        _metric(f"p95, {at}", "95th percentile of the latency of such a request", f"p95_latency_s_{key}", milliseconds),
        _metric(f"p99, {at}", "99th percentile of the latency of such a request", f"p99_latency_s_{key}", milliseconds),
        _metric(f"between tokens, {at}", "behind such a prompt, after the first", f"inter_token_s_{key}", milliseconds),
        _metric(f"J/token, {at}", JOULES, f"joules_per_token_{key}", plain),
    ]


def _requests(often: str) -> list[Column]:
    """Requests that come at a rate."""
    at, key, waited = f"{often}/s", f"rate_{often}", "of requests from their coming to their answers"
    return [
        _bounded(f"p50, {at}", f"median {waited} (95 % CI)", f"p50_latency_s_{key}", milliseconds),
        _bounded(f"p95, {at}", f"95th percentile {waited} (95 % CI)", f"p95_latency_s_{key}", milliseconds),
        _bounded(f"p99, {at}", f"99th percentile {waited} (95 % CI, where they are enough)", f"p99_latency_s_{key}", milliseconds),
        _bounded(f"TTFT p95, {at}", "95th percentile of their time to first token (95 % CI)", f"p95_ttft_s_{key}", milliseconds),
        _bounded(f"answered, {at}", "share of the requests that were answered (95 % CI)", f"done_{key}", share),
        _metric(f"TTFT p50, {at}", "median of their time to first token", f"p50_ttft_s_{key}", milliseconds),
        _metric(f"TTFT p99, {at}", "99th percentile of their time to first token", f"p99_ttft_s_{key}", milliseconds),
        _metric(f"answered/s, {at}", "requests per second that were answered", f"served_per_s_{key}", plain),
        _metric(f"tokens/s, {at}", "new tokens per second of all that was answered", f"tokens_per_s_{key}", rate),
    ]


def _near_references() -> list[Column]:
    """How near the texts come to their references, and the change of that."""
    shown = []
    for key, (title, meaning) in NEAR.items():
        shown.append(_metric(title, meaning, key, points))
        shown.append(_bounded(f"Δ {title} (95 % CI)", "its points less the baseline's, paired by text", f"{key}_change", points))
    return shown


def _bounded(title: str, meaning: str, key: str, show: Callable[[float], str]) -> Column:
    """A figure with its confidence interval that a recipe asks for by name."""
    return Column(title, meaning, lambda row: with_interval(row.estimate(key), show), lambda row: row.get(key), True, True)


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else MISSING


def _device(row: VariantRow) -> str:
    return row.device or MISSING


def _on_gpu(result: OptimizationResult) -> bool:
    return any(row.device not in ("", "cpu") for row in result.measured)


def _threads(row: VariantRow) -> str:
    counts = [str(row.threads[batch]) for batch in sorted(row.threads, key=int)]
    return MISSING if not counts else counts[0] if len(set(counts)) == 1 else " / ".join(counts)


def terminal_table(result: OptimizationResult) -> Group:
    """The variants as rich tables; failed ones with their reasons, the ruled out only counted."""
    from rich.console import Group

    shown = [column for column in columns(result) if column.brief]
    asked = [column for column in shown if column.asked]
    parts = (asked[start : start + BESIDE] for start in range(0, len(asked), BESIDE))
    main = _main_table(result, [column for column in shown if not column.asked])
    return Group(main, *(_asked_table(result, part) for part in parts))


def _main_table(result: OptimizationResult, shown: list[Column]) -> Table:
    told = {"passed-over": "variants passed over by the search", "ruled-out": "combinations ruled out before running"}
    counts = {words: sum(row.status == status for row in result.variants) for status, words in told.items()}
    caption = ", ".join(f"{count} {words}" for words, count in counts.items() if count)
    table = _table(shown, visible(result.name), caption or None)
    table.add_column("outcome", overflow="fold", min_width=12)
    for row in ranked(result):
        fate = row.status if row.status in STYLES else row.reason
        _add(table, row, [*(column.text(row) for column in shown), fate], STYLES.get(row.status))
    for row in result.variants:
        if row.status in ("failed", "skipped"):
            _add(table, row, [*(MISSING for _ in shown), f"{row.status}: {row.reason}"], "dim")
    return table


def _asked_table(result: OptimizationResult, shown: list[Column]) -> Table:
    """What the recipe asks for by name."""
    table = _table(shown)
    for row in ranked(result):
        _add(table, row, [column.text(row) for column in shown], STYLES.get(row.status))
    return table


def _table(shown: list[Column], title: str | None = None, caption: str | None = None) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title) if title else None, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("variant", overflow="fold", min_width=12)
    for column in shown:
        table.add_column(column.title.replace(", ", "\n").replace(" (", "\n("), justify="right", no_wrap=True)
    return table


def _add(table: Table, row: VariantRow, cells: list[str], style: str | None) -> None:
    from rich.text import Text

    table.add_row(*map(Text, map(visible, [row.name, *cells])), style=style)


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
