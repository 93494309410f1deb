"""What a search does next: look at another variant, measure one as a whole, or end.

Asynchronous successive halving (Li et al. 2020) over two rungs: a short look (an export that keeps its parity bound, its size, few
windows of text, few rounds), and the whole measurement. One of every few that were looked at goes on, the best of those that may
still win; one that is ahead of the best by the worse bounds goes on at once, since the budget may end. One that cannot win by the
better bounds of its short look's intervals is never measured as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from featherweight.measure.goals import Figure, Objective, against_plain, bounded, choose_winner, judged_batch
from featherweight.measure.measurement import busy_note
from featherweight.measure.spec import BASELINE, ConstraintsSpec
from featherweight.measure.statistics import Estimate
from featherweight.progress import Metrics
from featherweight.recipe.plan import Plan, Variant

Kind = Literal["glance", "measure"]
ENDING = ("decide", "register", "promote")
RESERVED = 0.05
"""The share of the budget that is left for the ending, at least."""
UNSURE = 1.5
"""Times its estimate that a stage is given before one like it was seen, more where all took longer: the budget is to be kept."""


LATEST = 3
"""So many of a stage's nodes say how slow the machine is now."""


@dataclass(frozen=True)
class Goal:
    """What is to be kept, and what is to be best."""

    constraints: ConstraintsSpec
    objective: str

    def cannot_win(self, short: Metrics, measured: Mapping[str, Metrics]) -> str:
        """Why a variant cannot win, by the better bounds of its short look; empty where it may."""
        batch = judged_batch(self.objective, short)
        for name, bound in self.constraints.bounds.items():
            figure = bounded(name, batch)
            found = figure.read(short)
            if found and not figure.keeps(figure.best(found), bound):
                return f"{figure.text(found)} at a short look, and {figure.show(bound)} is asked for"
        figure = against_plain(batch)
        found = figure.read(short)
        if found and not figure.keeps(figure.best(found), 1.0):
            return f"{figure.text(found)} at a short look"
        leader, figure, found, best = self._beside_leader(short, measured)
        if found and best and figure.loss(figure.best(found)) > figure.loss(figure.worst(best)):
            return f"{figure.text(found)} at a short look, against {figure.text(best)} of {leader}"
        return ""

    def leads(self, short: Metrics, measured: Mapping[str, Metrics]) -> bool:
        """Whether a variant seems to keep every constraint, and is better than the best so far by the worst bounds of both."""
        _, figure, found, best = self._beside_leader(short, measured)
        if not found or not best or any(one > 0 for one in self.broken(short).values()):
            return False
        return figure.loss(figure.worst(found)) < figure.loss(figure.best(best))

    def _beside_leader(
        self, short: Metrics, measured: Mapping[str, Metrics]
    ) -> tuple[str | None, Figure, Estimate | None, Estimate | None]:
        """The best so far, what is to be best, and that of a variant and of it, as far as they are known."""
        leader = choose_winner(self.constraints, self.objective, measured).winner if measured else None
        figure = Objective.of(self.objective, short).figure
        return leader, figure, figure.read(short), figure.read(measured[leader]) if leader else None

    def place(self, short: Metrics) -> tuple[int, float, float]:
        """The less the better: constraints that it seems to break, by how much, then the objective."""
        figure = Objective.of(self.objective, short).figure
        found = figure.read(short)
        seems_broken = [one for one in self.broken(short).values() if one > 0]
        return len(seems_broken), sum(seems_broken), figure.loss(found.value) if found else float("inf")

    def told(self, step: Step, metrics: Metrics) -> str:
        """A line on what came of a step: what is to be best in it, and what decides among those that are level."""
        figures = ", ".join(figure.text(found) for figure, found in self._wanted(metrics) if found)
        told = f"{step.variant.name}, {'a short look' if step.kind == 'glance' else 'measured'}: {figures}"
        return "; ".join(filter(None, (told, busy_note(metrics))))

    def values(self, short: Metrics) -> tuple[float, ...] | None:
        """What is to be small: the objective, and what decides among those that are level in it; None where one is not known."""
        read = self._wanted(short)
        return tuple(figure.loss(found.value) for figure, found in read if found) if all(found for _, found in read) else None

    def _wanted(self, metrics: Metrics) -> list[tuple[Figure, Estimate | None]]:
        """What is to be best, and what decides among those that are level in it, as far as they are known."""
        wanted = Objective.of(self.objective, metrics)
        return [(figure, figure.read(metrics)) for figure in (wanted.figure, wanted.tie)]

    def broken(self, short: Metrics) -> dict[str, float]:
        """By how much of the bound each constraint that was looked at seems to be broken; zero or less where it is kept."""
        batch, found = judged_batch(self.objective, short), dict[str, float]()
        for name, bound in self.constraints.bounds.items():
            figure = bounded(name, batch)
            if estimate := figure.read(short):
                found[name] = (figure.loss(estimate.value) - figure.loss(bound)) / (abs(bound) or 1.0)
        return found


@dataclass(frozen=True)
class Step:
    """One thing to do: the node whose result is wanted."""

    kind: Kind
    variant: Variant

    @property
    def node(self) -> str:
        """The node's id."""
        return self.variant.glanced if self.kind == "glance" else self.variant.measured


@dataclass
class Pace:
    """Seconds that nodes took against what was estimated, by stage, the latest last.

    What comes next is given the longest of the last few of its stage, and not less than their mean: a machine that has other work
    grows slower while one looks, and half of all takes longer than a mean.
    """

    estimated: Mapping[str, float]
    stages: Mapping[str, str]
    seen: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def learn(self, node: str, seconds: float) -> None:
        """What a node took; nothing is learnt of one that was thought to take no time."""
        if self.estimated[node] > 0:
            self.seen.setdefault(self.stages[node], []).append((seconds, self.estimated[node]))

    def seconds(self, nodes: Collection[str]) -> float:
        """What these will take, with bad luck."""
        return sum(self.estimated[node] * self._factor(self.stages[node]) for node in nodes)

    def _factor(self, stage: str) -> float:
        if known := self.seen.get(stage):
            return max(_mean(known), *(took / thought for took, thought in known[-LATEST:]))
        every = [one for ones in self.seen.values() for one in ones]
        return max(UNSURE, _mean(every)) if every else UNSURE


def _mean(seen: list[tuple[float, float]]) -> float:
    """How many times its estimate all together took."""
    took, thought = (sum(one) for one in zip(*seen, strict=True))
    return took / thought


@dataclass
class Search:
    """The state of a search. budget: seconds. suggest: which of these to try next, by name. done: nodes that have run."""

    plan: Plan
    goal: Goal
    pace: Pace
    budget: float
    one_of: int
    suggest: Callable[[list[str]], str]
    done: set[str] = field(default_factory=set)
    glances: dict[str, Metrics] = field(default_factory=dict)
    measured: dict[str, Metrics] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    spent: float = 0.0

    @property
    def variants(self) -> dict[str, Variant]:
        """All but the baseline."""
        return {one.name: one for one in self.plan.variants if one.name != BASELINE}

    def next(self, spent: float) -> Step | None:
        """What to do next, so many seconds after the beginning; None where nothing is left, or no time for it.

        The first variant is looked at, and measured, in any case.
        """
        self.spent = spent
        waiting, measured = self._may_win(), len(self.measured) - (BASELINE in self.measured)
        ahead = [name for name in waiting if self.goal.leads(self.glances[name], self.measured)]
        if step := self._affordable([Step("measure", self.variants[name]) for name in ahead]):
            return step
        if waiting and len(self.glances) >= self.one_of * measured:
            return self._affordable([Step("measure", self.variants[name]) for name in waiting], free=measured == 0)
        if step := self._look(waiting):
            return step
        if step := self._affordable([Step("measure", self.variants[name]) for name in waiting]):
            return step
        return self._nearest() if measured == 0 else None

    def _nearest(self) -> Step | None:
        """Where nothing that was looked at may win: what comes nearest, so that it is said what to relax."""
        able = [name for name in self.glances if name not in self.failed]
        name = min(able, key=lambda name: self.goal.place(self.glances[name]), default=None)
        return Step("measure", self.variants[name]) if name else None

    def _look(self, waiting: list[str]) -> Step | None:
        """A variant to look at, where there is time for it, and to measure it or what waits for that.

        Until one could be served, what there is time to look at is looked at; the first, which costs least, in any case.
        """
        tried = self.glances.keys() | self.measured.keys() | self.failed
        untried = sorted((name for name in self.variants if name not in tried), key=self._cost)
        chosen = [name for name in untried if self._fits(Step("glance", self.variants[name]), waiting[:1] or [name])]
        if not chosen and not self.glances:
            chosen = [name for name in untried if self._cost(name) <= self.budget - self.spent]
            chosen = chosen or ([] if self.failed else untried[:1])
        return Step("glance", self.variants[self.suggest(chosen)]) if chosen else None

    def _fits(self, step: Step, then: list[str]) -> bool:
        wanted = {*self._missing(step.node), *(id for name in then for id in self._missing(self.variants[name].measured))}
        ending = max(self.pace.seconds(ENDING), RESERVED * self.budget)
        return self.pace.seconds(wanted) + ending <= self.budget - self.spent

    def _affordable(self, steps: list[Step], free: bool = False) -> Step | None:
        return next((step for step in steps if free or self._fits(step, [])), None)

    def _cost(self, name: str) -> float:
        return self.pace.seconds(self._missing(self.variants[name].glanced))

    def _missing(self, node: str) -> set[str]:
        return {id for id in self.plan.path(node) if id not in self.done}

    def _may_win(self) -> list[str]:
        """Those that were looked at, not measured, and may still win, the best first."""
        names = [name for name in self.glances if name not in self.measured and name not in self.failed]
        return sorted((name for name in names if not self.cannot_win(name)), key=lambda name: self.goal.place(self.glances[name]))

    def cannot_win(self, name: str) -> str:
        """See Goal.cannot_win."""
        return self.goal.cannot_win(self.glances[name], self.measured)

    def tell(self, step: Step, metrics: Metrics | None) -> None:
        """What came of a step; None where it failed."""
        name = step.variant.name
        if metrics is None:
            self.failed.add(name)
        else:
            (self.glances if step.kind == "glance" else self.measured)[name] = metrics

    def fate(self, name: str) -> str:
        """Why a variant was not measured as a whole."""
        if name not in self.glances:
            return "not tried: the search ended before"
        why = self.cannot_win(name)
        return f"cannot win: {why}" if why else "it may have won: the search's budget ended before it was measured as a whole"
