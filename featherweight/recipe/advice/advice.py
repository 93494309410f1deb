"""The advice: every engine and grid with what is to be expected of it, one recommendation with its reasons, and what to relax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featherweight.grid import grid_named
from featherweight.measure.figures import mebibytes, milliseconds, percent, rate
from featherweight.recipe.advice.candidates import Question, Row, rows
from featherweight.recipe.advice.hardware import USABLE
from featherweight.recipe.advice.rules import Ruling, choose
from featherweight.recipe.refusals import baseline_type, gib, memory_refusal
from featherweight.system.device import CPU


@dataclass(frozen=True)
class Advice:
    """All rows, the recommended one (None where nothing serves and fits), the ruling on the two engines, and notes."""

    question: Question
    rows: tuple[Row, ...]
    ruling: Ruling
    recommended: Row | None
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The recommendation in one line."""
        if self.recommended is None:
            return f"nothing serves this model here; {self.reasons[0]}" if self.reasons else "nothing serves this model here"
        return f"{self.recommended.name}: {'; '.join(self.reasons)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        question = self.question
        return {
            "checkpoint": question.source,
            "task": question.task,
            "model_type": question.facts.model_type,
            "parameters": question.facts.size.parameters,
            "device": question.roofs.device,
            "memory_bytes": question.roofs.memory_bytes,
            "bandwidth_bytes_s": question.roofs.bandwidth,
            "speeds_from": question.roofs.source,
            "workload": {
                "prompt_tokens": question.asked.prompt_tokens,
                "new_tokens": question.asked.new_tokens,
                "sequences": question.asked.sequences,
                "concurrent": question.asked.concurrent,
            },
            "max_loss": question.max_loss,
            "recommended": self.recommended.to_dict() if self.recommended else None,
            "reasons": list(self.reasons),
            "ctranslate2_or_vllm": self.ruling.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
        }


def advise(question: Question) -> Advice:
    """The advice on a question."""
    found = tuple(rows(question))
    best = recommended(question, found)
    reasons = tuple(reasons_for(question, best)) if best else (what_would_fit(question, found),)
    ruling = choose(question, found)
    absent = next((row.missing for row in found if row.engine == ruling.engine and row.missing), None)
    told = [*notes(question, best), *([f"{ruling.engine} cannot be started here yet: {absent}"] if absent else [])]
    return Advice(question, found, ruling, best, reasons, tuple(told))


def recommended(question: Question, found: tuple[Row, ...]) -> Row | None:
    """The fastest that serves, fits, keeps the loss and is installed; where none keeps it, the least lossy."""
    able = [row for row in found if row.can_serve and row.missing is None] or [row for row in found if row.can_serve]
    within = [row for row in able if row.keeps(question.max_loss)]
    return within[0] if within else min(able, key=lambda row: row.expected.loss if row.expected else 1.0, default=None)


def reasons_for(question: Question, best: Row) -> list[str]:
    """Why this one, in the order of what weighs."""
    sees, asked = best.expected, question.asked
    assert sees is not None
    told = [_grid_reason(best)] if best.offer.grid else []
    if best.offer.parts > 1:
        told.append(
            f"{best.offer.parts} GPUs share every layer: {gib(sees.memory_bytes)} on each of {gib(question.roofs.memory_bytes)}"
        )
    else:
        told.append(f"takes {gib(sees.memory_bytes)} of {gib(question.roofs.memory_bytes)}")
    if best.offer.batching == "continuous" and asked.concurrent:
        told.append(f"continuous batching at {asked.words}")
    told.append(
        f"the fastest expected at {asked.words}: about {rate(sees.tokens_per_s)} tokens/s, first token after {_ms(sees.ttft_s)}"
    )
    if best.keeps(question.max_loss):
        told.append(f"loss expected {percent(sees.loss)}")
    elif question.max_loss is not None:
        bound = percent(question.max_loss)
        told.append(f"loss expected {percent(sees.loss)}, more than the {bound} allowed, which nothing keeps: relax --max-loss")
    if best.missing:
        told.append(f"not installed here: {best.missing}")
    return told


def _ms(seconds: float) -> str:
    return milliseconds(seconds) if seconds < 10 else f"{seconds:.0f} s"


def _grid_reason(row: Row) -> str:
    grid = grid_named(str(row.offer.grid))
    kind = f"{grid.bits}-bit floats" if grid.kind == "float" else f"{grid.bits}-bit integers"
    finer = f", the most sensitive on {row.offer.mixed}" if row.offer.mixed else ""
    return f"a token reads {kind}{finer}"


def what_would_fit(question: Question, found: tuple[Row, ...]) -> str:
    """What to change where nothing serves: the least memory that would do, or the first refusal."""
    near = [row for row in found if row.expected is not None and row.too_large]
    if not near:
        return next((row.refused for row in found if row.refused), "no engine is known")
    least = min(near, key=lambda row: row.expected.memory_bytes if row.expected else 0.0)
    needed = (least.expected.memory_bytes if least.expected else 0.0) / USABLE
    weights = question.shape.weights
    room = USABLE * question.roofs.memory_bytes - least.offer.base
    share = (least.expected.weights_bytes if least.expected else 0.0) / weights if weights else 0.0
    largest = max(0.0, room / share) if share else 0.0
    what = "GPU memory" if question.roofs.device != CPU else "memory"
    return (
        f"the smallest, {least.name}, {least.too_large}; {gib(needed)} of {what} would do, or a model of at most about "
        f"{largest / 1e9:.2g} billion weights"
    )


def notes(question: Question, best: Row | None) -> list[str]:
    """What else is to be known."""
    told = []
    if question.facts.kept_grids:
        told.append(f"the checkpoint came on {question.facts.kept_grids[0].name} and keeps its integers: nothing is rounded again")
    elif question.facts.quantized:
        told.append(f"the checkpoint came packed ({question.facts.quantized}) and is unpacked to floats when it is loaded")
    if question.shape.experts:
        told.append(f"{question.shape.experts:.0%} of the body are experts', of whom a token asks {question.shape.active:.0%}")
    if question.shape.window:
        told.append(f"no layer looks further back than {question.shape.window} tokens")
    memory = question.machine.memory_bytes
    if reason := memory_refusal(question.facts.size, memory, baseline_type(question.facts, memory)):
        told.append(f"to make variants of it: {reason}")
    if best and best.expected and not best.measured and best.offer.grid:
        told.append(
            "losses were measured on a model of 15 million weights (benchmarks/README.md, ptq); larger ones lose less at 4 bits"
        )
    if question.task in ("text-generation", "text2text-generation") and question.roofs.device == CPU:
        told.append(f"a token reads its weights from memory at {mebibytes(question.roofs.bandwidth)} a second")
    return told
