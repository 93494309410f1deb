"""A registered version measured again: on its own text or a fresh one, on the engine as it is now; what has drifted since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from featherweight.errors import GateError
from featherweight.measure import goals
from featherweight.measure.figures import percent, with_interval
from featherweight.measure.goals import BITS_PER_BYTE, PEAK_MEMORY, QUALITY, SIZE, Figure, bounded
from featherweight.measure.measurement import Comparison, Quality, busy_note
from featherweight.measure.spec import ConstraintsSpec
from featherweight.measure.statistics import Estimate, bootstrap_ratio
from featherweight.visible import in_lines

ANYWHERE = frozenset({"max_quality_loss", "max_size_bytes", "max_changed_answers", "max_accuracy_loss", "max_reference_loss"})
"""Constraints that no other machine breaks or keeps by itself, as it does those of time and of memory."""


@dataclass(frozen=True)
class Drift:
    """One thing that is worse than it was, beyond the noise. mendable: whether making the model anew may mend it."""

    what: str
    reason: str
    mendable: bool = True


@dataclass(frozen=True)
class Then:
    """What was registered: the verified measurement and its goals, and whether the text of now is another than its own."""

    comparison: Comparison
    constraints: ConstraintsSpec
    objective: str
    fresh: bool

    def drifts(self, now: Comparison) -> tuple[Drift, ...]:
        """What `now` has worse than this; speed and memory on the same machine alone."""
        same_machine = now.machine == self.comparison.machine
        found = [
            *self._quality(now),
            *self._text(now),
            *(self._speed(now) if same_machine else ()),
            *self._broken(now, same_machine),
        ]
        return tuple(found)

    def _quality(self, now: Comparison) -> Iterator[Drift]:
        """What it loses beside the untouched checkpoint, and on its own text what each window says of it then and now."""
        was, change = self.comparison.quality_change, now.quality_change
        if change.low > was.high:
            told = f"{QUALITY.text(change)} beside the untouched checkpoint"
            yield Drift("quality", f"{told}, {with_interval(was, percent)} when registered")
        elif not self.fresh and now.variant.quality.of_text:
            again = bootstrap_ratio(now.variant.quality.nll, self.comparison.variant.quality.nll).shifted(-1.0)
            if again.low > (was.high - was.low) / 2:
                yield Drift("quality", f"bits per byte of the same windows {with_interval(again, percent)} (+ is worse)")

    def _text(self, now: Comparison) -> Iterator[Drift]:
        """Fresh text that the untouched checkpoint predicts worse is other text than it was registered for."""
        theirs, was = now.baseline.quality, self.comparison.baseline.quality
        if not self.fresh or not theirs.of_text:
            return
        change = bootstrap_ratio(_by_window(theirs), _by_window(was), paired=False).shifted(-1.0)
        if change.low > 0:
            told = f"bits per byte of the untouched checkpoint {with_interval(change, percent)} against the registered text's"
            yield Drift(
                "text", f"{told}: it reads other text than it was chosen on, which wants another checkpoint", mendable=False
            )

    def _speed(self, now: Comparison) -> Iterator[Drift]:
        """Slower beside the checkpoint than when registered, by more than the rounds of either measurement spread."""
        then, again = self.comparison.metrics(), now.metrics()
        figure, noise_key = goals.judged_speed(self.objective, again)
        was, is_now = figure.read(then), figure.read(again)
        noise = max(then.get(noise_key, 0.0), again.get(noise_key, 0.0))
        if was and is_now and is_now.high < was.low * (1 - noise):
            yield Drift("speed", f"{figure.text(is_now)}, {with_interval(was, figure.show)} when registered")

    def _broken(self, now: Comparison, same_machine: bool) -> Iterator[Drift]:
        """Constraints that are surely broken: not kept even by the good bound of the interval, or known then and not any more."""
        then, metrics = self.comparison.metrics(), now.metrics()
        batch = goals.judged_batch(self.objective, metrics)
        for name, bound in self.constraints.bounds.items():
            figure = bounded(name, batch)
            was, estimate = figure.read(then), figure.read(metrics)
            if not same_machine and name.partition(".")[0] not in ANYWHERE:
                continue
            if estimate is None and was is not None:
                yield Drift(name, goals.not_measured(figure))
            elif estimate and not figure.keeps(figure.best(estimate), bound):
                yield Drift(name, f"{figure.text(estimate)}, {figure.show(bound)} allowed")


def _by_window(quality: Quality) -> list[float]:
    return [nll / size for nll, size in zip(quality.nll, quality.bytes, strict=True)]


@dataclass(frozen=True)
class Remeasurement:
    """A version's figures when it was registered, and now. text: the fresh one, '' for its own. run: MLflow's, which holds it.

    otherwise: libraries that are others now, 'was → is'. same_machine: whether speeds may be compared. rebuilt: what became of
    making it anew, '' where that was not done. replaced: whether another version is champion since.
    """

    model: str
    version: str
    text: str
    then: Mapping[str, float]
    now: Mapping[str, float]
    otherwise: Mapping[str, str]
    same_machine: bool
    drifts: tuple[Drift, ...]
    run: str = ""
    rebuilt: str = ""
    replaced: bool = False

    @property
    def rebuild_may_win(self) -> bool:
        """Whether what drifted, or a library that is another now, speaks for making the model anew."""
        return bool(self.otherwise) or any(one.mendable for one in self.drifts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "drifted": bool(self.drifts), "rebuild_may_win": self.rebuild_may_win}

    def to_text(self) -> str:
        """Each figure then and now, what is otherwise, and what drifted."""
        where = f"on {self.text}" if self.text else "on the text that it was registered with"
        lines = [f"{self.model}/{self.version} {where}", *self._figures()]
        lines += [f"library  {name}: {change}" for name, change in self.otherwise.items()]
        for when, metrics in (("then", self.then), ("now", self.now)):
            note = busy_note(metrics)
            lines += [f"{when}: {note}"] if note else []
        lines += [] if self.same_machine else ["another machine than when it was registered: speed and memory are not judged"]
        lines += [f"drifted  {one.what}: {one.reason}" for one in self.drifts] or ["nothing has drifted"]
        after = f"rebuilt  {self.rebuilt}" if self.rebuilt else "a rebuild may win (--rebuild)" if self.rebuild_may_win else ""
        return in_lines([*lines, *([after] if after else [])])

    def _figures(self) -> Iterator[str]:
        speeds = [*map(goals.speed, goals.measured_batches(self.now)), *map(goals.prompt_speed, goals.timed_prompts(self.now))]
        for figure in (QUALITY, BITS_PER_BYTE, *speeds, SIZE, PEAK_MEMORY):
            was, is_now = figure.read(self.then), figure.read(self.now)
            if was and is_now:
                yield f"{figure.name + figure.at:<20}  then {_shown(figure, was)}, now {_shown(figure, is_now)}"

    def raise_if_drifted(self) -> None:
        """Raise GateError naming what drifted, where no other version is champion since."""
        if self.drifts and not self.replaced:
            told = "; ".join(f"{one.what}: {one.reason}" for one in self.drifts)
            raise GateError(f"version {self.version} of '{self.model}' has drifted: {told}")


def _shown(figure: Figure, estimate: Estimate) -> str:
    return with_interval(estimate, figure.show)
