"""`featherweight advise`: a question from the command line, and its answer as a table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from featherweight.errors import RecipeError, nearest
from featherweight.measure.figures import MISSING, mebibytes, milliseconds, percent, rate
from featherweight.recipe.advice.advice import Advice, advise
from featherweight.recipe.advice.asking import facts_named, machine_asked, question_of, source_named
from featherweight.recipe.advice.candidates import Row
from featherweight.recipe.advice.expected import Asked
from featherweight.recipe.refusals import gib
from featherweight.spec import Task
from featherweight.system.device import Wanted
from featherweight.visible import visible

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Described:
    """A machine in a user's words: what is said otherwise than it is here."""

    device: str = "auto"
    gpus: int | None = None
    gpu_memory_gib: float | None = None
    compute_capability: str | None = None
    memory_gib: float | None = None
    cards: str = ""


def share_of(text: str) -> float | None:
    """'1%' or '0.01' as a share, 'none' as no bound. Raises RecipeError."""
    if text == "none":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", text.strip())
    if found is None:
        raise RecipeError(f"--max-loss {text}: give a share, such as 1% or 0.01, or none")
    return float(found[1]) / (100 if found[2] else 1)


def advice_on(name: str, machine: Described, asked: Asked, max_loss: str, task: str | None, workspace: Path) -> Advice:
    """The advice on a checkpoint that a user names. Raises CheckpointError, RecipeError, ToolchainError."""
    source = source_named(name)
    facts = facts_named(source, cast("Task | None", _known(task, get_args(Task), "--task")))
    described = (machine.gpus, machine.gpu_memory_gib, machine.compute_capability, machine.memory_gib)
    there, here = machine_asked(*described, machine.cards)
    device = cast("Wanted", _known(machine.device, get_args(Wanted), "--device"))
    return advise(question_of(source, facts, there, here, device, asked, share_of(max_loss), workspace))


def _known(text: str | None, known: tuple[str, ...], option: str) -> str | None:
    if text is not None and text not in known:
        raise RecipeError(f"{option} {text}: {nearest(text, known)}")
    return text


def advice_view(advice: Advice) -> RenderableType:
    """The model and machine, the table, the recommendation, the ruling, the notes."""
    from rich.console import Group
    from rich.text import Text

    question, size = advice.question, advice.question.facts.size.parameters
    roofs = question.roofs
    count = f"{roofs.count} x " if roofs.count > 1 else ""
    where = f"{roofs.device}, {count}{gib(roofs.memory_bytes)} at {roofs.bandwidth / 1e9:.0f} GB/s ({roofs.source})"
    model = f"{question.facts.model_type}, {size / 1e6:.4g} million weights, {question.task}"
    asked = question.asked
    work = f"{asked.words}, {asked.prompt_tokens} + {asked.new_tokens} tokens"
    lines = [Text(visible(f"{model}; {where}; {work}"), style="bold"), _table(advice)]
    lines.append(Text.assemble(("recommended  ", "bold green"), advice.headline))
    lines.append(Text.assemble(("CTranslate2 or vLLM?  ", "bold"), f"{advice.ruling.line}  [{advice.ruling.source}]"))
    return Group(*lines, *(Text(visible(f"note  {note}"), style="dim") for note in advice.notes))


def _table(advice: Advice) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("engine and grid", "made by", "memory", "tokens/s", "first token", "loss", "speed known by"):
        table.add_column(title, overflow="fold")
    for row in (row for row in advice.rows if row.refused is None):
        style = "bold green" if row is advice.recommended else "dim" if not row.can_serve else ""
        table.add_row(*map(Text, _cells(row, advice.question.max_loss)), style=style)
    for reason, names in _refused(advice).items():
        table.add_row(Text(names), *[Text(MISSING)] * 5, Text(visible(f"cannot: {reason}")), style="dim")
    return table


def _refused(advice: Advice) -> dict[str, str]:
    """What cannot serve, by the reason."""
    found: dict[str, list[str]] = {}
    for row in advice.rows:
        if row.refused is not None:
            found.setdefault(row.refused, []).append(row.name)
    return {reason: ", ".join(names) for reason, names in found.items()}


def _cells(row: Row, max_loss: float | None) -> list[str]:
    sees = row.expected
    assert sees is not None
    made = "as it came" if row.offer.grid and not row.quantize else row.quantize.method if row.quantize else "float"
    loss = f"{percent(sees.loss)}{' measured' if row.measured else ''}{'' if row.keeps(max_loss) else ' (too much)'}"
    what = row.too_large or (f"not installed: {row.missing}" if row.missing else sees.basis)
    first = milliseconds(sees.ttft_s) if sees.ttft_s < 10 else f"{sees.ttft_s:.0f} s"
    return [row.name, made, mebibytes(sees.memory_bytes), rate(sees.tokens_per_s), first, loss, what]
