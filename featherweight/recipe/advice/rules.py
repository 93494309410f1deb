"""CTranslate2 or vLLM: rules in the order in which they decide, each with its reason and its source.

A rule looks at the best that each of the two has to offer, and says which one, or nothing. The first that says something decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from featherweight.measure.figures import rate
from featherweight.recipe.advice.candidates import Question, Row
from featherweight.system.device import CPU

TWO = ("ctranslate2", "vllm")
NAMES = {"ctranslate2": "CTranslate2", "vllm": "vLLM"}
MANY = 4
"""Requests at a time from which on places that wait for others in a static batch are worth more than a step's own cost."""
PAGED = "Kwon et al., PagedAttention, SOSP 2023; docs.vllm.ai: continuous batching, paged keys and values"
STATIC = "CTranslate2's guide, Parallel and asynchronous execution: a batch runs to its longest answer"
CPU_FIRST = "benchmarks/README.md, stories15m: CTranslate2 int8 12.6x and vLLM 1.3x of eager at batch 1"
TENSOR_PARALLEL = "docs.vllm.ai, Parallelism; CTranslate2 loads through this project on one GPU"


@dataclass(frozen=True)
class Ruling:
    """Which engine ('' for neither), the reason that decided, where it comes from, and the rule."""

    engine: str
    reason: str
    source: str
    rule: str

    @property
    def line(self) -> str:
        """In one line."""
        return f"{NAMES.get(self.engine, 'neither')}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Two:
    """The rows of both engines, and the best of each: that serves, fits, and keeps the loss where one does."""

    question: Question
    rows: dict[str, list[Row]]

    def best(self, engine: str) -> Row | None:
        """Its fastest that keeps the loss, else its least lossy."""
        able = [row for row in self.rows[engine] if row.can_serve]
        within = [row for row in able if row.keeps(self.question.max_loss)]
        return within[0] if within else min(able, key=_loss, default=None)

    def refused(self, engine: str) -> str | None:
        """Why none of its rows can serve, whatever the machine's size: that of the first; None where one can."""
        reasons = [row.refused for row in sorted(self.rows[engine], key=lambda row: row.offer.grid is None)]
        first = reasons if self.question.facts.kept_grids else reasons[::-1]
        return next((reason for reason in first if reason), None) if all(reasons) else None

    def too_large(self, engine: str) -> str | None:
        """Why none that could serve fits; None where one does, or none could."""
        if self.best(engine) is not None:
            return None
        sizes = [row for row in self.rows[engine] if row.expected and row.too_large]
        return min(sizes, key=lambda row: row.expected.memory_bytes).too_large if sizes else None  # type: ignore[union-attr]


def _loss(row: Row) -> float:
    return row.expected.loss if row.expected else float("inf")


def choose(question: Question, rows: Iterable[Row]) -> Ruling:
    """The first rule's answer that has one."""
    found = list(rows)
    two = Two(question, {engine: [row for row in found if row.engine == engine] for engine in TWO})
    return next(ruling for rule in RULES if (ruling := rule(two)) is not None)


def one_cannot_serve(two: Two) -> Ruling | None:
    """An engine that refuses the model, its task or all its grids leaves the other."""
    source, rule = "the engine's own refusal (featherweight/runtimes)", "one cannot serve"
    first, second = (two.refused(engine) for engine in TWO)
    if first and second:
        return Ruling("", f"neither serves it; {NAMES[TWO[0]]}: {first}; {NAMES[TWO[1]]}: {second}", source, rule)
    if first or second:
        able, unable = (TWO[1], TWO[0]) if first else TWO
        return Ruling(able, f"{NAMES[unable]} cannot: {first or second}", source, rule)
    return None


def one_does_not_fit(two: Two) -> Ruling | None:
    """Memory that one of them does not come under."""
    source, rule = "weights, cache and activations by the model's headers", "one does not fit"
    first, second = (two.too_large(engine) for engine in TWO)
    if first and second:
        return Ruling("", f"neither fits; {NAMES[TWO[0]]} at least {first}; {NAMES[TWO[1]]} at least {second}", source, rule)
    if not first and not second:
        return None
    able, unable = (TWO[1], TWO[0]) if first else TWO
    best = two.best(able)
    if best and best.offer.parts > 1:
        reason = f"{best.offer.parts} GPUs share every layer (tensor parallel); on one, CTranslate2 {first}"
        return Ruling(able, reason, TENSOR_PARALLEL, "several GPUs")
    return Ruling(able, f"{NAMES[unable]} {first or second}", source, rule)


def one_keeps_the_quality(two: Two) -> Ruling | None:
    """Where one of them comes under the loss that is allowed, and the other does not."""
    keeps = {engine: (best := two.best(engine)) is not None and best.keeps(two.question.max_loss) for engine in TWO}
    if len(set(keeps.values())) == 2:
        able = next(engine for engine, kept in keeps.items() if kept)
        reason = "its grids keep the loss that is allowed, and the other's do not"
        return Ruling(able, reason, "benchmarks/README.md: ptq", "one keeps the quality")
    return None


def many_at_a_time_on_a_gpu(two: Two) -> Ruling | None:
    """Requests that come and go: vLLM takes a new one in at every token, and keeps keys and values in pages."""
    asked = two.question.asked
    if not asked.concurrent or asked.sequences < MANY or two.question.roofs.device == CPU:
        return None
    reason = (
        f"continuous batching and paged keys and values at {asked.sequences} requests at a time; a static batch waits for its "
        "longest answer"
    )
    return Ruling("vllm", reason, f"{PAGED}; {STATIC}", "many at a time on a GPU")


def a_cpu_alone(two: Two) -> Ruling | None:
    """On a CPU CTranslate2's int8 kernels and its library in the process beat vLLM's server, unless the roofs say otherwise."""
    if two.question.roofs.device != CPU or _faster(two)[0] != "ctranslate2":
        return None
    asked = two.question.asked
    reason = f"on a CPU at {asked.words}: int8 rows in the caller's process, where vLLM pays for a server's step, {_figures(two)}"
    return Ruling("ctranslate2", reason, CPU_FIRST, "a CPU alone")


def the_faster_one(two: Two) -> Ruling | None:
    """What the roofs say."""
    waits = "; a static batch waits for its longest answer" if two.question.asked.concurrent else ""
    reason = f"expected faster at {two.question.asked.words}: {_figures(two)}{waits}"
    return Ruling(_faster(two)[0], reason, "the roofs, and each engine's share of them: benchmarks/advice.md", "the faster one")


RULES: tuple[Callable[[Two], Ruling | None], ...] = (
    one_cannot_serve,
    one_does_not_fit,
    one_keeps_the_quality,
    many_at_a_time_on_a_gpu,
    a_cpu_alone,
    the_faster_one,
)


def _faster(two: Two) -> list[str]:
    return sorted(TWO, key=lambda engine: -_speed(two.best(engine)))


def _speed(row: Row | None) -> float:
    return row.expected.tokens_per_s if row and row.expected else 0.0


def _figures(two: Two) -> str:
    """The best of each with its speed, the faster first."""
    shown = ((two.best(engine), NAMES[engine]) for engine in _faster(two))
    return ", ".join(f"{row.name if row else name} about {rate(_speed(row))} tokens/s" for row, name in shown)
