"""A recipe from advice: what is worth trying of it, as YAML whose comments carry the reasons, searched within a budget.

The first to run is what can be served soonest: the recommended engine on weights rounded to nearest. Then follow the other engines
and grids by their expected speed, then other ways to the best grids; `featherweight.recipe.search` goes on until the budget ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from featherweight.errors import RecipeError
from featherweight.measure.figures import percent, rate
from featherweight.measure.spec import BASELINE
from featherweight.model.positions import context_tokens
from featherweight.quantization.catalog import QUANTIZERS
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.advice.advice import Advice
from featherweight.recipe.advice.candidates import Question, Row, methods
from featherweight.recipe.advice.measured import computes
from featherweight.recipe.cost import estimate
from featherweight.recipe.facts import Facts
from featherweight.recipe.plan import Plan, expand
from featherweight.recipe.recipe import Recipe
from featherweight.recipe.search.policy import UNSURE
from featherweight.runtimes.spec import CompileSpec
from featherweight.spec import HEADED
from featherweight.text.sources import STDLIB

FAR_BEHIND = 0.25
"""A share of the best one's expected speed below which an engine is not worth a try."""
STRETCH = 3.0
"""How many times the allowed loss may be expected of what is faster than all that keeps it: larger models lose less."""
OTHER_WAYS = 2
"""Grids that other methods are tried for."""
FIRST = 1 / 3
"""Of the budget, at most, until the first variant is measured as a whole: the workload is shortened for it."""
SHORTER: tuple[Mapping[str, int], ...] = ({}, {"new_tokens": 64}, {"new_tokens": 32, "windows": 30, "rounds": 3})
"""Caps of the workload, one row after another where a model is large for its budget."""
SAMPLE_BYTES = 1_000_000
"""Of the standard library's source, where no text is given."""


@dataclass(frozen=True)
class Try:
    """A variant that is worth a try. why: what is said of it. quantize: None for none."""

    row: Row
    quantize: QuantizeSpec | None
    why: str

    @property
    def quantized(self) -> str:
        """The name of the alternative of the quantize stage, such as 'rtn4-g32' or 'mix4'; 'none' for none."""
        spec = self.quantize
        if spec is None:
            return "none"
        grid = spec.grid.removeprefix("int")
        mixed, body = "-mix" if spec.mixed else "", "" if spec.head else "-body"
        return f"{spec.method}{mixed}{'' if grid[0].isdigit() else '-'}{grid}{body}"

    @property
    def served(self) -> str:
        """The name of the alternative of the last stage."""
        how = [computes(self.row.offer.keys)]
        parts = [f"tp{self.row.offer.parts}"] if self.row.offer.parts > 1 else []
        return "-".join(filter(None, [self.row.engine, *how, *parts])).replace("_", "-")

    @property
    def name(self) -> str:
        """Of the variant."""
        return self.served if self.quantize is None else f"{self.quantized}/{self.served}"

    @property
    def speed(self) -> float:
        """New tokens per second that are expected."""
        return self.row.expected.tokens_per_s if self.row.expected else 0.0


@dataclass(frozen=True)
class Composed:
    """The recipe, its text with the reasons, seconds that all of it is expected to take, and what was left out with the reason."""

    recipe: Recipe
    text: str
    seconds: float
    left_out: Mapping[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """As a file that `featherweight optimize` takes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text)
        return path


def compose(
    advice: Advice, budget_s: float, text: str | None = None, seconds: Callable[[Plan], Mapping[str, float]] | None = None
) -> Composed:
    """The recipe of what is worth trying; searched, where all of it may take longer than `budget_s`. text: a file, a folder or
    another source of text.

    seconds: of each node of a plan, by default as it is estimated for this machine. Raises RecipeError where nothing serves.
    """
    tries = list(worth_trying(advice))
    if not tries:
        raise RecipeError(f"no recipe can be made of the advice: {advice.headline}")
    question = advice.question
    plan = _plan(question, tries, text)
    able = {variant.name for variant in plan.variants}
    chosen = [one for one in tries if one.name in able] or tries[:1]
    left_out = {one.name: plan.ruled_out.get(one.name, "ruled out") for one in tries if one.name not in able}
    cost = seconds or (lambda plan: _estimated(plan, question))
    took, caps = sum(cost(plan).values()), SHORTER[0]
    searched = budget_s if UNSURE * took > budget_s else None
    if searched:
        caps, took = _shortened(question, chosen, text, budget_s, cost)
    tree = _tree(question, chosen, text, searched, caps)
    return Composed(Recipe.model_validate(tree), _written(advice, tree, chosen, left_out, took, budget_s, text), took, left_out)


def _plan(question: Question, tries: list[Try], text: str | None, caps: Mapping[str, int] = SHORTER[0]) -> Plan:
    tree = _tree(question, tries, text, caps=caps)
    return expand(Recipe.model_validate(tree), question.machine, Facts({question.source: question.facts}))


def _shortened(
    question: Question, tries: list[Try], text: str | None, budget_s: float, cost: Callable[[Plan], Mapping[str, float]]
) -> tuple[Mapping[str, int], float]:
    """The first caps by which the first variant is measured in good time, or the last; and the seconds of all that is planned."""
    for caps in SHORTER:
        plan = _plan(question, tries, text, caps)
        took = cost(plan)
        first = {
            id for name in (BASELINE, tries[0].name) for one in plan.variants if one.name == name for id in plan.path(one.measured)
        }
        if sum(took[id] for id in first) <= FIRST * budget_s:
            break
    return caps, sum(took.values())


def _estimated(plan: Plan, question: Question) -> dict[str, float]:
    return {id: cost.seconds for id, cost in estimate(plan, {}, set(), question.facts.size).items()}


def worth_trying(advice: Advice) -> Iterator[Try]:
    """In the order in which they are to run, each once."""
    seen: set[str] = set()
    for one in _by_worth(advice):
        if one.name not in seen:
            seen.add(one.name)
            yield one


def _by_worth(advice: Advice) -> Iterator[Try]:
    best, bound = advice.recommended, advice.question.max_loss
    if best is None:
        return
    able = [row for row in advice.rows if row.can_serve and row.missing is None and _beside_the_baseline(row)]
    fast = [row for row in able if _speed(row) >= FAR_BEHIND * _speed(best)]
    keeping = [best, *(row for row in fast if row.keeps(bound) and row is not best)]
    cheap = [row for row in keeping if not row.offer.mixed and (row is best or _speed(row) <= _speed(best))]
    yield Try(best, _cheapest(advice.question, best), "the advice's first choice, by the cheapest way to its grid")
    yield from (Try(row, _cheapest(advice.question, row), _why(row)) for row in cheap[1:])
    for row in [row for row in cheap if row.offer.grid and row.quantize][:OTHER_WAYS]:
        yield from (Try(row, spec, f"another way to {row.offer.grid}") for spec in methods(advice.question, row.offer)[:2])
    for row in fast:
        if row.offer.mixed and row.keeps(bound):
            yield Try(row, row.quantize, "the most sensitive matrices on more bits, found by a scan")
        elif not row.keeps(bound) and _loss(row) <= STRETCH * (bound or 1.0) and _speed(row) > _speed(best):
            yield Try(row, row.quantize, "faster, and expected to lose more than allowed: measured, since larger models lose less")


def _beside_the_baseline(row: Row) -> bool:
    """What is measured anyway needs no variant."""
    return row.name != "torch float32"


def _speed(row: Row) -> float:
    return row.expected.tokens_per_s if row.expected else 0.0


def _loss(row: Row) -> float:
    return row.expected.loss if row.expected else 1.0


def _why(row: Row) -> str:
    if row.offer.grid is not None:
        return "another engine or grid"
    return "no rounding at all" if row.offer.width == 4 else "floats of 16 bits"


def _cheapest(question: Question, row: Row) -> QuantizeSpec | None:
    """The first in the catalog of the methods that are level, which reads no text; None where nothing is to be quantized."""
    if row.quantize is None:
        return None
    known = {spec.method: spec for spec in methods(question, row.offer)}
    return next((known[name] for name in QUANTIZERS if name in known), row.quantize)


def _tree(
    question: Question, tries: list[Try], text: str | None, budget_s: float | None = None, caps: Mapping[str, int] = SHORTER[0]
) -> dict[str, Any]:
    """The recipe, without comments. budget_s: within which it is searched; None where all of it is measured. caps: see SHORTER."""
    stages: dict[str, dict[str, Any]] = {"quantize": {}, "compile": {}, "export": {}}
    for one in tries:
        if one.quantize is not None:
            stages["quantize"][one.quantized] = _said(one.quantize)
        stage = "compile" if isinstance(one.row.serve, CompileSpec) else "export"
        stages[stage][one.served] = {"engine": one.row.engine, **one.row.offer.keys}
    name = name_of(question.source)
    return {
        "name": name,
        "checkpoint": {"source": question.source},
        "task": question.task,
        "device": question.roofs.device,
        "data": _data(text),
        "stages": {stage: made for stage, made in stages.items() if made},
        "variants": [_line(one) for one in tries],
        **({} if budget_s is None else {"search": {"budget": f"{budget_s:.0f}s"}}),
        "workload": _workload(question, caps),
        **({} if question.max_loss is None else {"constraints": {"max_quality_loss": question.max_loss}}),
        "objective": f"speedup@{question.asked.sequences}",
        "advice": {one.name: round(one.speed, 1) for one in sorted(tries, key=lambda one: _rank(question, one), reverse=True)},
        "promote": {"model": name, "stage": "staging"},
    }


def _rank(question: Question, one: Try) -> tuple[bool, float]:
    """What is expected to win comes first: that which keeps the loss, by speed."""
    return one.row.keeps(question.max_loss), one.speed


def _said(spec: QuantizeSpec) -> dict[str, Any]:
    """What a recipe has to say of it."""
    return {"method": spec.method, **spec.model_dump(mode="json", exclude_defaults=True, include={"grid", "mixed"})} | {
        "grid": spec.grid,
        "head": spec.head,
    }


def _line(one: Try) -> dict[str, str]:
    return {"quantize": one.quantized, "serve": one.served} if one.quantize else {"serve": one.served}


def _data(text: str | None) -> dict[str, Any]:
    if text is None:
        return {"source": STDLIB, "evaluation": 0.2, "calibration": 0.2, "max_bytes": SAMPLE_BYTES}
    return {"source": text, "evaluation": 0.2, "calibration": 0.2}


def _workload(question: Question, caps: Mapping[str, int]) -> dict[str, Any]:
    """The question's own lengths, as far as the context and `caps` go, in windows that small models and texts fill."""
    context, asked = context_tokens(question.facts.config), question.asked
    prompt = min(asked.prompt_tokens, max(1, context // 4))
    told: dict[str, Any] = {"prompt_tokens": prompt, "batch_sizes": sorted({1, 8, asked.sequences})}
    if question.task in ("text-generation", "text2text-generation"):
        told["new_tokens"] = min(asked.new_tokens, max(1, context // 4))
    told |= {"windows": 100 if question.task in HEADED else 60, "window_tokens": max(2, min(256, context))}
    fewer = {key: min(most, told.get(key, most)) for key, most in caps.items() if key in told or key == "rounds"}
    return told | fewer


def name_of(source: str) -> str:
    """A recipe's name, made of the checkpoint's."""
    last = re.split(r"[/:]", source.rstrip("/").partition("@")[0])[-1].lower().removesuffix(".gguf")
    return re.sub(r"[^a-z0-9.-]+", "-", last).strip("-.") or "model"


def _written(
    advice: Advice,
    tree: dict[str, Any],
    tries: list[Try],
    left_out: Mapping[str, str],
    took: float,
    budget_s: float,
    text: str | None,
) -> str:
    """The recipe with its reasons as comments."""
    head = [
        "Composed by featherweight from its advice; change what you like.",
        advice.headline,
        f"CTranslate2 or vLLM: {advice.ruling.line}",
    ]
    ends = f"; it ends after {budget_s:.0f} s with the best found by then" if "search" in tree else ""
    head += [*advice.notes, f"All of it would take about {took:.0f} s{ends}."]
    head += [f"Left out: {name}: {reason}" for name, reason in left_out.items()]
    sections = {key: _dumped({key: value}) for key, value in tree.items()}
    if text is None:
        sections["data"] = (
            _comment("No text was given: the source of Python's standard library, as in recipes/demo.yaml.") + sections["data"]
        )
    if asked := _longer(advice.question, tree["workload"]):
        sections["workload"] = _comment(asked) + sections["workload"]
    sections["advice"] = (
        _comment("Tokens per second that were expected, what was to win first; the report holds it against what came.")
        + sections["advice"]
    )
    sections["variants"] = "variants:\n" + "".join(f"{_comment(_of(one), '  ')}  - {_flow(_line(one))}\n" for one in tries)
    return "".join(_comment(line) for line in head) + "\n" + "\n".join(sections.values())


def _longer(question: Question, workload: Mapping[str, Any]) -> str:
    """What the workload would be with time enough; empty where it is that."""
    whole = _workload(question, SHORTER[0])
    less = [f"{key} {value}" for key, value in whole.items() if workload[key] != value]
    return f"Shortened, so that several variants are measured within the budget; with more time: {', '.join(less)}." if less else ""


def _of(one: Try) -> str:
    sees = one.row.expected
    figures = f"about {rate(one.speed)} tokens/s, loss {percent(sees.loss)}" if sees else ""
    return f"{one.why}: {figures} expected"


def _comment(text: str, indent: str = "") -> str:
    return f"{indent}# {' '.join(text.split())}\n"


def _dumped(value: dict[str, Any]) -> str:
    flat = all(isinstance(one, str | int | float) for one in value.values())
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=False if flat else None, width=1000)


def _flow(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=1000).strip()
