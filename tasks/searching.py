"""The nodes of a plan whose variants are searched: what all share, one variant after another as the search wants, then the end.

Its record lies in the workspace, and as of the last step beside the run in MLflow. A search that was killed first repeats what is
on record, which is in the cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from featherweight.errors import StageError
from featherweight.measure.spec import BASELINE
from featherweight.progress import Metrics
from featherweight.recipe.cost import estimate
from featherweight.recipe.facts import Facts
from featherweight.recipe.plan import Plan, Variant
from featherweight.recipe.recipe import Recipe
from featherweight.recipe.search.policy import ENDING, Goal, Pace, Search, Step
from featherweight.recipe.search.study import Features, Study, Told, features
from featherweight.spec import Spec
from featherweight.store.artifact import content_digest
from tasks.outcome import PASSED_OVER, Outcome, Outcomes
from tasks.parent_run import ParentRun
from tasks.stages import stage_named

STATE = "search.json"
Run = Callable[[Plan, Outcomes], Outcomes]
"""Runs the nodes of a plan, given the outcomes of others."""


def run_searched(recipe: Recipe, plan: Plan, facts: Facts, parent: ParentRun, run: Run) -> Outcomes:
    """The outcome of every node, 'passed-over' of those that the search did not come to. Raises what an essential node raises."""
    begun = time.monotonic()
    outcomes = dict(run(_part(plan, _first(plan) if recipe.advice else ()), {}))
    outcomes |= run(_part(plan, _shared(plan) - outcomes.keys()), outcomes)
    study = _study(recipe, plan, outcomes, parent)
    before = study.seconds
    work = _Work(plan, run, study, outcomes, parent, _search(recipe, plan, facts, study), lambda: before + time.monotonic() - begun)
    work.repeat()
    work.go_on()
    return work.end()


@dataclass
class _Work:
    """A search at work. spent: seconds since it first began, without what it was stopped for."""

    plan: Plan
    run: Run
    study: Study
    outcomes: dict[str, Outcome]
    parent: ParentRun
    search: Search
    spent: Callable[[], float]

    def repeat(self) -> None:
        """What is known before the first step of now."""
        self._learn(self.outcomes)
        self._take(self.outcomes)
        variants = self.search.variants
        steps = [Step("glance", variants[name]) for name in self.study.looked_at]
        for step in (*steps, *(Step("measure", variants[name]) for name in self.study.measured)):
            self._do(step)

    def go_on(self) -> None:
        """Step after step, until the search has no other."""
        while step := self.search.next(self.spent()):
            metrics = self._do(step)
            if metrics:
                self.parent.progress.tell("say", self.search.goal.told(step, metrics))
            if step.kind == "measure":
                self.study.tell_measured(step.variant.name, self.spent())
            else:
                goal = self.search.goal
                told = Told(step.variant.name, goal.values(metrics), goal.broken(metrics)) if metrics else Told(step.variant.name)
                self.study.tell(told, self.spent())
            self._note()

    def _do(self, step: Step) -> Metrics | None:
        missing = [id for id in self.plan.path(step.node) if id not in self.outcomes]
        begun = time.monotonic()
        made = self.run(_part(self.plan, missing), self.outcomes)
        self._learn(made, time.monotonic() - begun)
        self._take(made)
        ref = self.outcomes[step.node].ref
        self.search.tell(step, ref.metrics if ref else None)
        return ref.metrics if ref else None

    def _take(self, made: Outcomes) -> None:
        self.outcomes |= made
        self.search.done |= made.keys()
        if whole := self.outcomes.get(f"{BASELINE}/evaluate"):
            self.search.measured[BASELINE] = whole.artifact.metrics

    def _learn(self, made: Mapping[str, Outcome], whole_s: float | None = None) -> None:
        """How long nodes took that were computed now. whole_s: what went by meanwhile, around them too."""
        took = {id: one.artifact.seconds for id, one in made.items() if one.status == "done"}
        around = whole_s / sum(took.values()) if took and whole_s else 1.0
        for id, seconds in took.items():
            self.search.pace.learn(id, seconds * around)

    def _note(self) -> None:
        """How far it is, beside the run in MLflow."""
        search, study, client = self.search, self.study, self.parent.client
        state = {"study": study.name, "journal": study.path.name, "seconds": self.spent(), "measured": study.measured}
        looked_at = study.looked_at
        tried = [{"variant": name, "failed": name in search.failed, "short": search.glances.get(name)} for name in looked_at]
        client.log_text(self.parent.run_id, json.dumps({**state, "looked_at": tried}, indent=1), STATE)
        client.log_metric(self.parent.run_id, "search_looked_at", len(looked_at))
        client.log_metric(self.parent.run_id, "search_measured", len(study.measured))

    def end(self) -> Outcomes:
        """Say of the rest why it was passed over; then decide, register, promote."""
        if f"{BASELINE}/evaluate" not in self.outcomes:  # nothing that was looked at could be served
            self._take(self.run(_part(self.plan, {f"{BASELINE}/evaluate"}), self.outcomes))
        for variant in self.search.variants.values():
            if variant.measured not in self.outcomes:
                self.outcomes[variant.measured] = self._passed_over(variant)
        rest = {id: Outcome(id, PASSED_OVER) for id in self.plan.nodes if id not in self.outcomes and id not in ENDING}
        known = {**self.outcomes, **rest}
        known |= self.run(_part(self.plan, ENDING), known)
        return {id: known[id] for id in self.plan.nodes}

    def _passed_over(self, variant: Variant) -> Outcome:
        looked_at = self.outcomes.get(variant.glanced)
        if looked_at and looked_at.error:
            return Outcome(variant.measured, looked_at.status, error=looked_at.error)
        return Outcome(variant.measured, PASSED_OVER, error=StageError(self.search.fate(variant.name)))


def _search(recipe: Recipe, plan: Plan, facts: Facts, study: Study) -> Search:
    assert recipe.search is not None
    students = {name: one.size for name, one in facts.by_source.items()}
    costs = {id: cost.seconds for id, cost in estimate(plan, {}, set(), facts.size(recipe), students=students).items()}
    pace = Pace(costs, {id: node.stage for id, node in plan.nodes.items()})
    goal = Goal(recipe.constraints, recipe.objective)
    return Search(plan, goal, pace, recipe.search.budget, recipe.search.one_of, study.suggest)


def _part(plan: Plan, ids: Iterable[str]) -> Plan:
    wanted = set(ids)
    return replace(plan, nodes={id: node for id, node in plan.nodes.items() if id in wanted})


def _first(plan: Plan) -> set[str]:
    """What makes the first variant, which advice has put there as what can be served soonest."""
    variant = next((one for one in plan.variants if one.name != BASELINE), plan.variants[0])
    return {*plan.path("gate"), *plan.path(variant.served)}


def _shared(plan: Plan) -> set[str]:
    """What is run in any case before a variant is looked at: the text, its gate, the checkpoint, a short look at the baseline.

    The baseline is measured as a whole beside the first variant that is.
    """
    baseline = next(one for one in plan.variants if one.name == BASELINE)
    return {*plan.path(baseline.glanced), *plan.path("gate")}


def _study(recipe: Recipe, plan: Plan, outcomes: Outcomes, parent: ParentRun) -> Study:
    """The record of just this: another recipe, text, code or machine has another."""
    keys = {id: stage_named(node.stage).key(node, {}) for id, node in plan.nodes.items() if id not in ENDING}
    goal = [recipe.constraints.model_dump(mode="json"), recipe.objective, recipe.seed]
    name = content_digest([keys, goal, outcomes[f"{BASELINE}/glance"].artifact.digest])
    made = {one.name: _features(recipe, one) for one in plan.variants if one.name != BASELINE}
    advised = tuple(made) if recipe.advice else ()  # a composed recipe's variants stand in the order of their worth
    return Study(parent.workspace.root / "search" / f"{recipe.name}.journal", name, recipe.seed, made, advised=advised)


def _features(recipe: Recipe, variant: Variant) -> Features:
    stages = recipe.stages
    alternatives: list[Mapping[str, Spec]] = [stages.distill, stages.prune, stages.quantize, {**stages.compile, **stages.export}]
    chosen = zip(("distill", "prune", "quantize", "serve"), alternatives, variant.choices, strict=True)
    return features({stage: _keys(known.get(choice)) for stage, known, choice in chosen})


def _keys(spec: Spec | None) -> dict[str, Any] | None:
    return spec.model_dump(mode="json") if spec else None
