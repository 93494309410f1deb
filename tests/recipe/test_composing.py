"""A recipe composed from advice: valid, in the order of what can be served first, within its budget, with its reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from featherweight.errors import RecipeError
from featherweight.measure.spec import WorkloadSpec
from featherweight.model.facts import CheckpointFacts
from featherweight.recipe.advice.advice import advise
from featherweight.recipe.advice.candidates import Question
from featherweight.recipe.advice.composing import Composed, compose, name_of
from featherweight.recipe.advice.hardware import Roofs
from featherweight.recipe.plan import Plan
from featherweight.recipe.reading import load_recipe, recipe_text
from featherweight.report.overruled import advice_line
from featherweight.report.page import render_report
from featherweight.report.result import OptimizationResult, VariantRow
from featherweight.system.device import CPU
from tests.support.advising import SMALL, encoder, machine, t5

SECONDS = {"evaluate": 20.0, "compile": 10.0, "export": 10.0, "quantize": 5.0, "sensitivity": 300.0}


def seconds(plan: Plan) -> dict[str, float]:
    return {id: SECONDS.get(node.stage, 1.0) + (30 if "-mix" in id else 0) for id, node in plan.nodes.items()}


def composed(
    facts: CheckpointFacts,
    budget_s: float,
    text: str | None = None,
    max_loss: float = 0.01,
    cost: Callable[[Plan], dict[str, float]] = seconds,
) -> Composed:
    there = machine()
    roofs = Roofs(CPU, there.memory_bytes, 2e10, dict.fromkeys(("float32", "float16", "int8", "fp8"), 5e11))
    question = Question("models/small", facts, facts.task, there, roofs, max_loss=max_loss, here=False)
    return compose(advise(question), budget_s, text, cost)


@pytest.mark.parametrize(
    "facts", [SMALL, t5(), encoder("bert", "BertModel", "feature-extraction"), encoder("bert", "BertForMaskedLM", "fill-mask")]
)
def test_what_is_written_is_the_recipe_with_reasons_beside_it(facts: CheckpointFacts, tmp_path: Path) -> None:
    made = composed(facts, 600, "text.txt")
    read = load_recipe(made.write(tmp_path / "place" / "recipe.yaml"))
    assert recipe_text(read) == recipe_text(made.recipe)
    assert (read.task, read.data.source, read.promote.stage) == (facts.task, "text.txt", "staging")
    assert read.constraints.max_quality_loss == 0.01
    lines = made.text.splitlines()
    assert lines[0].startswith("# Composed by featherweight") and any("CTranslate2 or vLLM" in line for line in lines)
    variants = [number for number, line in enumerate(lines) if line.startswith("  - {")]
    assert variants and all(lines[number - 1].startswith("  # ") and "expected" in lines[number - 1] for number in variants)


def test_what_can_be_served_soonest_stands_first_and_costly_ways_last() -> None:
    made = composed(SMALL, 10_000)
    first, *others = [(line.quantize, line.serve) for line in made.recipe.variants or ()]
    assert first == (("rtn8",), ("onnxruntime-genai-int8",)) and not made.left_out
    names = ["/".join(part[0] for part in one if part[0] != "none") for one in others]
    assert names.index("rtn8/ctranslate2-int8") < names.index("gptq8/onnxruntime-genai-int8")
    assert names.index("gptq8/onnxruntime-genai-int8") < next(i for i, name in enumerate(names) if "-mix" in name)
    assert next(iter(made.recipe.advice or {})) == "rtn8/onnxruntime-genai-int8"
    assert not any(name.startswith("torch-static") for name in made.recipe.advice or {})


def test_floats_of_16_bits_are_not_called_unrounded() -> None:
    lines = composed(SMALL, 10_000).text.splitlines()
    said = {line.strip("- {}"): before for before, line in pairwise(lines) if line.startswith("  - {serve")}
    assert said["serve: llama.cpp-float16"].startswith("  # floats of 16 bits: ")
    assert said["serve: ctranslate2-float32"].startswith("  # no rounding at all: ")


def test_what_takes_longer_than_the_budget_is_searched() -> None:
    rich, poor = composed(SMALL, 10_000), composed(SMALL, 150)
    assert rich.recipe.search is None and poor.recipe.search is not None and poor.recipe.search.budget == 150
    assert poor.recipe.variants == rich.recipe.variants and len(poor.recipe.variants or ()) > 5
    assert rich.seconds == poor.seconds > 150
    assert "it ends after 150 s" in poor.text and "All of it would take about" in rich.text and "it ends" not in rich.text


def test_a_workload_is_shortened_until_the_first_variant_is_measured_in_good_time() -> None:
    """Beside some 70 s for the rest, two measurements cost 2 s for each new token."""

    def by_tokens(plan: Plan) -> dict[str, float]:
        whole = {id: node.spec for id, node in plan.nodes.items() if id.endswith("/evaluate")}
        return seconds(plan) | {id: 2.0 * spec.new_tokens for id, spec in whole.items() if isinstance(spec, WorkloadSpec)}

    shapes = {}
    for budget in (3000, 1000, 300, 30):
        workload = composed(SMALL, budget, cost=by_tokens).recipe.workload
        shapes[budget] = workload.new_tokens, workload.windows, workload.rounds
    assert shapes == {3000: (128, 60, 5), 1000: (64, 60, 5), 300: (32, 30, 3), 30: (32, 30, 3)}
    told = composed(SMALL, 300, cost=by_tokens).text
    assert (
        "# Shortened, so that several variants are measured within the budget; with more time: new_tokens 128, windows 60." in told
    )


def test_without_a_text_it_says_which_is_taken() -> None:
    made = composed(SMALL, 100)
    assert made.recipe.data.source == "python-stdlib" and "# No text was given" in made.text


def test_where_nothing_serves_there_is_no_recipe() -> None:
    there = machine(0.1)
    roofs = Roofs(CPU, there.memory_bytes, 2e10, dict.fromkeys(("float32", "float16", "int8", "fp8"), 5e11))
    with pytest.raises(RecipeError, match="GiB of memory would do"):
        compose(advise(Question("x", SMALL, SMALL.task, there, roofs, here=False)), 600, None, seconds)


def test_a_recipe_is_named_by_its_checkpoint() -> None:
    assert [name_of(one) for one in ("/a/Stories 15M", "hf:org/Name@rev", "s3://b/p/", "m/x.Q8_0.gguf")] == [
        "stories-15m",
        "name",
        "p",
        "x.q8-0",
    ]


def test_the_report_tells_where_measurement_overruled_advice(tmp_path: Path) -> None:
    expected = {"a": 80.0, "b": 60.0}
    rows = (
        VariantRow("a", "e", "loser", reason="quality loss +2 %", metrics={"tokens_per_s_1": 90.0}),
        VariantRow("b", "e", "winner", metrics={"tokens_per_s_1": 70.0}),
    )
    result = OptimizationResult("t", "speedup@1", "b", rows)
    line = advice_line(result, expected)
    assert line.startswith("measurement overruled the advice: it expected a first") and "quality loss +2 %" in line
    assert "b, 60 tokens/s expected and 70 measured" in line
    assert advice_line(replace(result, winner="a"), expected).startswith("measurement agreed")
    far = advice_line(replace(result, winner="a"), {**expected, "a": 7695.0})
    assert far.startswith("measurement chose what the advice expected first, at another speed: a, 7695 tokens/s expected and 90")
    stays = advice_line(replace(result, winner="baseline"), expected)
    assert "expected a first (a, 80 tokens/s expected and 90 measured" in stays and stays.endswith(
        "nothing that it advised keeps the constraints"
    )
    failed = replace(result, winner=None, variants=(VariantRow("a", "e", "failed", reason="no parity"),))
    assert "it expected a first (failed: no parity)" in advice_line(failed, expected)
    assert "(it was not run)" in advice_line(replace(failed, variants=()), expected)
    assert advice_line(result, {}) == ""
    render_report(replace(result, advice=line, best_found="the best found is b"), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "measurement overruled the advice: it expected a first" in page and "the best found is b" in page
