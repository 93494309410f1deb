"""Searching among variants: alternatives in bulk, what is done next, and a record that a kill leaves whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from featherweight.errors import IntegrityError
from featherweight.measure.goals import choose_winner
from featherweight.measure.spec import BASELINE, ConstraintsSpec
from featherweight.recipe.plan import Plan, expand
from featherweight.recipe.recipe import Recipe
from featherweight.recipe.search.policy import Goal, Pace, Search, Step
from featherweight.recipe.search.study import Study, Told
from tests.support.searching import TREE, figures


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({**TREE, **changes})


def test_a_space_is_spread_into_named_alternatives_and_survives_its_own_dump() -> None:
    made = recipe(stages={"quantize": {"rtn-int8-int8": {"method": "rtn", "scale": "mse"}}})
    assert list(made.stages.quantize) == [
        *("rtn-int8-int8", "rtn-int8-no-head", "rtn-int4-g32-int8", "rtn-int4-g32-no-head"),
        *("gptq-int8-int8", "gptq-int8-no-head", "gptq-int4-g32-int8", "gptq-int4-g32-no-head"),
    ]
    assert made.stages.quantize["rtn-int8-int8"].scale == "mse", "what stands there already stays"
    assert (made.stages.quantize["gptq-int4-g32-no-head"].grid, made.stages.quantize["gptq-int4-g32-no-head"].head) == (
        "int4-g32",
        None,
    )
    assert list(made.stages.export) == ["ctranslate2-float32", "ctranslate2-int8", "torch-dynamic"]
    assert made.search is not None and made.search.budget == 300
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(made.model_dump(mode="json")))) == made


def test_shares_lists_and_keys_of_their_own_have_names_too() -> None:
    finetunes = [{"steps": 10}, {"steps": 20}]
    space = {
        "distill": {"layers": [2, [0, 2]]},
        "prune": {"ratio": [0.1, 0.25], "finetune": finetunes},
        "export": {"engine": "vllm"},
    }
    made = recipe(search={"budget": 60, "space": space}).stages
    assert list(made.distill) == ["distill-2", "distill-0-2"] and made.distill["distill-0-2"].layers == (0, 2)
    assert list(made.prune) == ["prune-0.1", "prune-0.25", "prune-0.1-2", "prune-0.25-2"]
    assert made.prune["prune-0.25-2"].finetune.steps == 20 and list(made.export) == ["vllm"]


def test_speculation_may_be_searched_beside_none() -> None:
    space = {"export": {"engine": "llama.cpp", "speculation": [None, "ngram"]}}
    made = recipe(search={"budget": 60, "space": space})
    assert list(made.stages.export) == ["llama.cpp-no-speculation", "llama.cpp-ngram"] and not expand(made).ruled_out


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"budget": "soon"}, "give a time, such as 90s"),
        ({"budget": "1m", "space": {"quantise": {}}}, "space.quantise"),
        ({"budget": "1m", "space": {"quantize": [1]}}, "space.quantize"),
        ({"budget": "1m", "space": {"quantize": {"metod": ["rtn"]}}}, "metod"),
        ({"budget": 0}, "greater than 0"),
    ],
)
def test_a_search_that_is_none_is_refused(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        recipe(search=search)
    assert message.split(".")[-1] in str(caught.value)


def test_the_plan_has_a_short_look_beside_every_measurement() -> None:
    workload = {"batch_sizes": [1, 8], "rounds": 7, "changed_answers": {}, "lengths": [32], "requests": {"rate": 4}}
    plan = expand(recipe(workload=workload, objective="speedup@8"))
    looks = {one.glanced for one in plan.variants}
    assert looks < plan.nodes.keys() and len(looks) == len(plan.variants) > 5
    spec = plan.nodes["rtn-int8-int8/ctranslate2-int8/glance"].spec
    assert (spec.batch_sizes, spec.windows, spec.rounds, spec.changed_answers) == ((8,), 16, 3, None)
    inputs = plan.nodes["rtn-int8-int8/ctranslate2-int8/glance"].inputs
    assert (
        inputs["baseline_measurement"] == "baseline/glance" and "baseline_measurement" not in plan.nodes["baseline/glance"].inputs
    )
    assert not any(id.endswith("/glance") for id in expand(recipe(search=None, stages={"export": {"a": {"engine": "vllm"}}})).nodes)


# What is done next


PLAN = expand(recipe())
NAMES = [one.name for one in PLAN.variants if one.name != BASELINE]
GOAL = Goal(ConstraintsSpec(max_quality_loss=0.02), "speedup@1")


def searched(
    truth: dict[str, tuple[float, float]], budget: float, pace: float | Callable[[float], float] = 1.0, plan: Plan = PLAN
) -> tuple[Search, float]:
    """A search to its end on variants whose figures are known, each node taking `pace` times its estimate; and its seconds.

    pace: a number, or what is drawn of it after so many seconds.
    """
    estimated = {
        id: 2.0 if id.endswith("/glance") else 10.0 if node.stage == "evaluate" else 1.0 for id, node in plan.nodes.items()
    }
    stages = {id: node.stage for id, node in plan.nodes.items()}
    search = Search(plan, GOAL, Pace(estimated, stages), budget, 3, lambda names: names[0])
    search.measured[BASELINE] = figures(1.0, 0.0, 0.0)
    search.done = {
        id for one in plan.variants if one.name == BASELINE for id in (*plan.path(one.measured), *plan.path(one.glanced))
    }
    spent = 0.0
    while step := search.next(spent):
        for id in plan.path(step.node):
            if id not in search.done:
                took = estimated[id] * (pace(spent) if callable(pace) else pace)
                spent += took
                search.pace.learn(id, took)
                search.done.add(id)
        known = truth.get(step.variant.name)
        search.tell(step, figures(*known, 0.2 if step.kind == "glance" else 0.02) if known else None)
    return search, spent


truths = st.lists(st.none() | st.tuples(st.floats(0.5, 20), st.floats(0, 0.1)), min_size=len(NAMES), max_size=len(NAMES)).map(
    lambda drawn: {name: one for name, one in zip(NAMES, drawn, strict=True) if one}
)


@settings(max_examples=40, deadline=None)
@given(truths)
def test_with_time_enough_the_search_finds_who_wins_among_all(truth: dict[str, tuple[float, float]]) -> None:
    search, _ = searched(truth, 10**6)
    everyone = {BASELINE: figures(1.0, 0.0, 0.0), **{name: figures(*one, 0.02) for name, one in truth.items()}}
    best = choose_winner(GOAL.constraints, GOAL.objective, everyone).winner
    assert choose_winner(GOAL.constraints, GOAL.objective, search.measured).winner == best
    assert search.failed == set(NAMES) - truth.keys()
    for name in set(truth) - search.measured.keys():
        assert search.fate(name).startswith("cannot win: ")


@settings(max_examples=40, deadline=None)
@given(truths, st.floats(20, 200), st.floats(0.3, 3))
def test_a_search_keeps_its_budget_once_it_knows_its_pace(
    truth: dict[str, tuple[float, float]], budget: float, pace: float
) -> None:
    search, spent = searched(truth, budget, pace)
    first, measured = pace * (1 + 1 + 2 + 10), pace * 10 if search.failed else 0  # the first that does not fail, however late
    assert spent <= max(budget, first) + measured + 1e-9
    if truth and budget > 30 * pace * len(NAMES):
        assert search.measured.keys() > {BASELINE}


def test_a_machine_that_grows_slower_while_one_searches_costs_the_budget_little() -> None:
    """Each node takes 0.7 to 2 times its estimate by chance, and half as long again towards the end."""
    budget, over = 120.0, []
    truth = {name: (1.0 + index, index / 1000) for index, name in enumerate(NAMES)}
    for seed in range(60):
        draw = Random(seed)
        _, spent = searched(truth, budget, lambda so_far, draw=draw: draw.lognormvariate(0.26, 0.3) * (1 + so_far / budget / 2))
        over.append(spent / budget)
    assert sorted(over)[-3] <= 1.0 and max(over) <= 1.06
    assert sum(over) / len(over) > 0.7, "and the budget is used"


def test_what_took_longest_of_the_last_few_is_expected_of_the_next() -> None:
    pace = Pace({id: 10.0 for id in "abcdef"}, {**dict.fromkeys("abcde", "export"), "f": "evaluate"})
    assert pace.seconds("a") == 15.0
    for id, took in zip("abc", (20.0, 5.0, 8.0), strict=True):
        pace.learn(id, took)
    assert pace.seconds("d") == 20.0 and pace.seconds("f") == 15.0
    pace.learn("d", 6.0)
    assert pace.seconds("e") == pytest.approx(9.75), "the first was long ago: the mean of all, which none of the last exceeds"


def test_where_nothing_may_win_what_comes_nearest_is_measured_all_the_same() -> None:
    truth = {name: (5.0, 0.05 + index / 100) for index, name in enumerate(NAMES[1:])}
    search, _ = searched(truth, 10**6)
    assert search.measured.keys() == {BASELINE, NAMES[1]} and search.failed == {NAMES[0]}
    assert search.fate(NAMES[-1]).startswith("cannot win: quality loss")
    failing, _ = searched({}, 10**6)
    assert failing.measured.keys() == {BASELINE} and failing.failed == set(NAMES)


def test_a_first_variant_that_fails_is_no_end_of_a_search_that_has_time_to_look_at_others() -> None:
    truth = {name: (4.0, 0.0) for name in NAMES[2:]}
    search, spent = searched(truth, 15.0)
    assert search.failed == set(NAMES[:2]) and search.measured.keys() == {BASELINE, NAMES[2]}
    assert spent > 15.0, "the first that can be served is measured in any case"
    gone, spent = searched({}, 6.0)
    assert 0 < len(gone.failed) < len(NAMES) and spent <= 6.0


def test_what_a_short_look_rules_out_is_said_with_its_numbers() -> None:
    told = GOAL.cannot_win(figures(5.0, 0.08, 0.1), {})
    assert told == "quality loss +8.00 % [+7.80, +8.20] at a short look, and +2.00 % is asked for"
    leader = {BASELINE: figures(1.0, 0.0, 0.0), "quick": figures(10.0, 0.0, 0.02)}
    told = GOAL.cannot_win(figures(5.0, 0.0, 0.1), leader)
    assert told == "speed 5.00x [4.50, 5.50] at batch 1 at a short look, against speed 10.0x [9.80, 10.2] at batch 1 of quick"
    assert GOAL.cannot_win(figures(9.5, 0.0, 0.1), leader) == ""


def test_what_speculation_slows_at_a_short_look_is_not_measured() -> None:
    slowed = {f"speculation_speedup_1{end}": value for end, value in (("", 0.8), ("_low", 0.7), ("_high", 0.9))}
    assert GOAL.cannot_win(figures(5, 0, 0.1) | slowed, {}).startswith(
        "speed against the same without speculation 0.80x [0.70, 0.90]"
    )
    assert not GOAL.cannot_win(figures(5, 0, 0.1) | slowed | {"speculation_speedup_1_high": 1.1}, {})


def test_what_came_of_a_step_is_told_in_a_line() -> None:
    one = next(one for one in PLAN.variants if one.name == NAMES[0])
    told = GOAL.told(Step("glance", one), figures(5.0, 0.0, 0.1))
    assert told == f"{NAMES[0]}, a short look: speed 5.00x [4.50, 5.50] at batch 1, quality loss +0.00 % [−0.20, +0.20]"


def test_what_is_ahead_of_the_best_so_far_is_measured_before_others_are_looked_at() -> None:
    """Another look may take far longer than was reckoned, and the budget with it."""
    truth = dict(zip(NAMES, [(2.0, 0.0), (4.0, 0.0), *[(1.0, 0.0)] * (len(NAMES) - 2)], strict=True))
    search, _ = searched(truth, 42.0)
    assert search.measured.keys() == {BASELINE, *NAMES[:2]} and search.glances.keys() == set(NAMES[:2])
    leader = {BASELINE: figures(1.0, 0.0, 0.0), "quick": figures(10.0, 0.0, 0.02)}
    assert GOAL.leads(figures(12.0, 0.0, 0.1), leader)
    assert not GOAL.leads(figures(11.0, 0.0, 0.1), leader), "their intervals overlap"
    assert not GOAL.leads(figures(12.0, 0.03, 0.1), leader), "it seems to lose too much"
    assert not GOAL.leads(figures(12.0, 0.0, 0.1), {})


def test_a_step_beside_other_programs_is_told_as_one() -> None:
    one = next(one for one in PLAN.variants if one.name == NAMES[0])
    told = GOAL.told(Step("measure", one), figures(5.0, 0.0, 0.1) | {"others_cpu_share": 0.42})
    assert "; other programs took over 10% of the processors while it was timed" in told
    assert "other programs" not in GOAL.told(Step("measure", one), figures(5.0, 0.0, 0.1) | {"others_cpu_share": 0.09})


# The record


def study(path: Path, seed: int = 0) -> Study:
    grids = ("int8", "int4-g32", "int4-g64", "int8-g32")
    made = {f"{m}-{g}": {"quantize.method": m, "quantize.grid": g} for m in ("rtn", "gptq", "awq", "qat") for g in grids}
    return Study(path, "study", seed, made)


def walk(record: Study, steps: int) -> list[str]:
    """Names that are tried one after another: of int4 all is fast, of qat nothing works."""
    for _ in range(steps):
        name = record.suggest([name for name in record.variants if name not in record.looked_at])
        speed = 4.0 if "int4" in name else 1.0
        broken = {"max_quality_loss": -0.1 if "gptq" in name else 0.5}
        record.tell(Told(name) if "qat" in name else Told(name, (-speed, 0.01), broken), 1.5)
    return record.looked_at


def test_a_record_that_was_left_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = walk(study(tmp_path / "whole.journal"), 12)
    walk(study(tmp_path / "cut.journal"), 5)
    again = study(tmp_path / "cut.journal")
    again.tell_measured(again.looked_at[0], 9.5)
    assert again.seconds == 9.5 and again.measured == whole[:1]
    assert walk(study(tmp_path / "cut.journal"), 7) == whole and len(set(whole)) == 12
    assert walk(study(tmp_path / "other.journal", seed=1), 12) != whole


def test_what_is_advised_is_tried_first_until_the_record_says_where_to_look(tmp_path: Path) -> None:
    made = study(tmp_path / "advised.journal")
    advised = tuple(sorted(made.variants))
    found = walk(replace(made, advised=advised), 12)
    assert found[:8] == list(advised[:8]) and found[8:] != list(advised[8:12]) and len(set(found)) == 12
    assert replace(study(tmp_path / "some.journal"), advised=advised[:1]).suggest(list(advised[1:])) == advised[1]


@pytest.mark.parametrize("left", [1, 60, -1])
def test_half_a_line_at_the_end_of_a_record_is_cut_off_and_other_damage_is_said(tmp_path: Path, left: int) -> None:
    path = tmp_path / "cut.journal"
    walk(study(path), 3)
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: -len(last)] + last[:left])
    tried = walk(study(path), 2)
    assert len(set(tried)) == 5 and study(path).looked_at == tried
    path.write_bytes(whole.replace(b"}", b"", 1))
    with pytest.raises(IntegrityError, match=r"cut\.journal is damaged .* move it away"):
        _ = study(path).looked_at
