"""A search over a plan's nodes: what runs, what is passed over and why, and that a killed one repeats nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featherweight.measure.spec import BASELINE
from featherweight.recipe.facts import Facts
from featherweight.recipe.plan import Plan, expand
from featherweight.recipe.recipe import Recipe
from featherweight.recipe.search.policy import ENDING
from featherweight.store.artifact import ArtifactRef, content_digest
from tasks.outcome import Outcome, Outcomes
from tasks.parent_run import ParentRun
from tasks.searching import STATE, run_searched
from tests.support.searching import TREE, figures
from tests.support.stores import new_workspace

RECIPE = Recipe.model_validate(
    {
        **TREE,
        "search": {
            "budget": "1h",
            "one_of": 2,
            "space": {
                "quantize": {"method": "rtn", "grid": ["int8", "int8-reduced"]},
                "export": {"engine": "ctranslate2", "compute_type": ["float32", "int8", "int8_float32"]},
            },
        },
        "constraints": {"max_quality_loss": 0.02},
    }
)
PLAN = expand(RECIPE)
LOSSY = {name for name in (one.name for one in PLAN.variants) if "reduced" in name}


class Engine:
    """Runs nodes by telling made-up figures; `fails` where it is not right, and Ctrl-C before the `stop`th node."""

    def __init__(self, stop: int | None = None, fails: str = "") -> None:
        self.ran: list[str] = []
        self.stop, self.fails = stop, fails

    def __call__(self, plan: Plan, known: Outcomes) -> Outcomes:
        made: dict[str, Outcome] = {}
        for id, node in plan.nodes.items():
            if len(self.ran) == self.stop:
                raise KeyboardInterrupt
            self.ran.append(id)
            lacking = next((origin for origin in node.inputs.values() if {**known, **made}[origin].returned is None), None)
            if id not in ENDING and (id == self.fails or lacking):
                error = ValueError("not right") if lacking is None else {**known, **made}[lacking].error
                made[id] = Outcome(id, "failed" if lacking is None else "blocked", error=error)
            else:
                ref = ArtifactRef(uri="here", digest=content_digest(id), run_id="run", node=id, seconds=0.5, metrics=self.told(id))
                made[id] = Outcome(id, "done", ref.model_dump())
        return made

    def told(self, id: str) -> dict[str, float]:
        name, _, kind = id.rpartition("/")
        if kind not in ("glance", "evaluate"):
            return {}
        speed = 1.0 if name == BASELINE else 4.0 if name.endswith("int8") else 2.0
        return dict(figures(speed, 0.5 if name in LOSSY else 0.0, 0.1 if kind == "glance" else 0.01))


@pytest.fixture
def parent(tmp_path: Path) -> Callable[[], ParentRun]:
    """A new run each time, in one workspace."""
    workspace = new_workspace(tmp_path)
    client = workspace.client()
    experiment = client.create_experiment("searched")
    return lambda: ParentRun(workspace, experiment, client.create_run(experiment).info.run_id)


def search(parent: ParentRun, engine: Engine) -> dict[str, Any]:
    return dict(run_searched(RECIPE, PLAN, Facts(), parent, engine))


@pytest.mark.slow
def test_a_killed_search_repeats_what_is_on_record_and_ends_as_one_that_was_not(parent: Callable[[], ParentRun]) -> None:
    whole = Engine()
    first = parent()
    outcomes = search(first, whole)
    assert list(outcomes) == list(PLAN.nodes) and len(whole.ran) == len(set(whole.ran))
    passed = {one.name: outcomes[one.measured] for one in PLAN.variants if outcomes[one.measured].status == "passed-over"}
    assert passed.keys() >= LOSSY
    for name in LOSSY:
        assert passed[name].reason.startswith("cannot win: quality loss +50.0 %")
        assert outcomes[f"{name}/glance"].status == "done" and f"{name}/evaluate" not in whole.ran
    assert "decide" in whole.ran[-3:] and outcomes["promote"].status == "done"
    run = first.client.get_run(first.run_id)
    assert run.data.metrics["search_looked_at"] == len(PLAN.variants) - 1
    assert STATE in [file.path for file in first.client.list_artifacts(first.run_id)]

    again = Engine()
    assert {id: one.status for id, one in search(parent(), again).items()} == {id: one.status for id, one in outcomes.items()}
    assert sorted(again.ran) == sorted(whole.ran), "nothing but what is on record"


@pytest.mark.slow
def test_ctrl_c_loses_no_step_and_a_failure_costs_one_variant(parent: Callable[[], ParentRun]) -> None:
    fails = "rtn-int8/ctranslate2-int8"
    whole = Engine(fails=fails)
    outcomes = search(parent(), whole)
    assert (outcomes[f"{fails}/evaluate"].status, outcomes[f"{fails}/evaluate"].reason) == ("blocked", "ValueError: not right")
    assert outcomes["decide"].status == "done"


def test_a_search_that_was_stopped_goes_on_where_it_was(parent: Callable[[], ParentRun]) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(parent(), stopped := Engine(stop=14))
    whole = search(parent(), resumed := Engine())
    looks = [id for id in stopped.ran if id.endswith("/glance")]
    assert [id for id in resumed.ran if id.endswith("/glance")][: len(looks)] == looks
    assert all(whole[one.measured].status in ("done", "passed-over") for one in PLAN.variants)


def test_the_first_look_comes_before_the_baseline_is_measured_which_is_measured_in_any_case(
    parent: Callable[[], ParentRun],
) -> None:
    search(parent(), usual := Engine())
    looks = [id for id in usual.ran if id.endswith("/glance")]
    assert looks[0] == f"{BASELINE}/glance" and usual.ran.index(looks[1]) < usual.ran.index(f"{BASELINE}/evaluate")
    advised = RECIPE.model_copy(update={"advice": {PLAN.variants[1].name: 10.0}})
    run_searched(advised, PLAN, Facts(), parent(), soon := Engine())
    assert soon.ran.index(PLAN.variants[1].served) < soon.ran.index(f"{BASELINE}/glance"), "what advice has put first"
    useless = Engine(fails="rtn-int8/ctranslate2-int8")
    only = Recipe.model_validate(
        {**RECIPE.model_dump(mode="json"), "variants": [{"quantize": "rtn-int8", "serve": "ctranslate2-int8"}]}
    )
    outcomes = dict(run_searched(only, expand(only), Facts(), parent(), useless))
    assert outcomes[f"{BASELINE}/evaluate"].status == "done" and outcomes["decide"].status == "done"
    assert useless.ran.index(f"{BASELINE}/evaluate") < useless.ran.index("decide")
