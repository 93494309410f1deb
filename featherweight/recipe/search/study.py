"""The record of a search, in Optuna's journal: what was looked at, what came of it; and what its sampler suggests next.

The sampler is the tree-structured Parzen estimator (Bergstra et al. 2011; of several objectives Ozaki et al. 2022), which is asked
anew each time, seeded by the seed and by how many were tried: the next suggestion depends on the record alone, killed or not.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from featherweight.errors import IntegrityError, one_line

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study as OptunaStudy

Features = Mapping[str, str]
"""What a variant is made of, as words by key."""
NAME, WHOLE, SECONDS = "variant", "measured", "seconds"
RANDOM_FIRST = 8
"""So many are tried before the record says where to look."""


@dataclass(frozen=True)
class Told:
    """What became of one that was looked at. values: of each objective, less is better; None where it failed.

    broken: by how much it breaks each constraint, zero or less where it keeps it.
    """

    name: str
    values: tuple[float, ...] | None = None
    broken: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A study of the journal `path`, of variants with these features. advised: what is tried first, in that order."""

    path: Path
    name: str
    seed: int
    variants: Mapping[str, Features]
    objectives: int = 2
    advised: Sequence[str] = ()

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The values of each key that differs among the variants."""
        from optuna.distributions import CategoricalDistribution

        keys = sorted({key for one in self.variants.values() for key in one})
        values = {key: sorted({one.get(key, "") for one in self.variants.values()}) for key in keys}
        return {key: CategoricalDistribution(found) for key, found in values.items() if len(found) > 1}

    @cached_property
    def record(self) -> OptunaStudy:
        """Optuna's own. Raises IntegrityError for a journal that is damaged."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_half_a_line(self.path)
        try:
            with _quiet():
                storage = JournalStorage(JournalFileBackend(str(self.path)))
                return optuna.create_study(storage=storage, study_name=self.name, directions=self._directions, load_if_exists=True)
        except (ValueError, KeyError) as error:
            raise IntegrityError(f"{self.path} is damaged ({one_line(error)}); move it away, and the search begins anew") from error

    @property
    def _directions(self) -> list[Literal["minimize", "maximize"]]:
        return ["minimize"] * self.objectives

    @property
    def looked_at(self) -> list[str]:
        """Those that are on record, in order."""
        return [str(trial.user_attrs[NAME]) for trial in self.record.get_trials(deepcopy=False)]

    @property
    def measured(self) -> list[str]:
        """Those that were measured as a whole, in order."""
        return list(self.record.user_attrs.get(WHOLE, ()))

    @property
    def seconds(self) -> float:
        """What the search has taken so far."""
        return float(self.record.user_attrs.get(SECONDS, 0.0))

    def suggest(self, untried: Sequence[str]) -> str:
        """The one among these that is most like what the sampler would try; the first where nothing is known yet.

        Until so many are on record that they say where to look, what is advised comes first.
        """
        import optuna

        trials = self.record.get_trials(deepcopy=False)
        advised = [name for name in self.advised if name in untried]
        if advised and len(trials) < RANDOM_FIRST:
            return advised[0]
        if not trials or not self.distributions:
            return untried[0]
        sampler = optuna.samplers.TPESampler(n_startup_trials=RANDOM_FIRST, seed=self.seed + len(trials))
        with _quiet():
            asked = optuna.create_study(directions=self._directions, sampler=sampler)
            asked.add_trials(trials)
            wish: dict[str, Any] = asked.ask(self.distributions).params
        chance = Random(self.seed + len(trials))
        order = {name: chance.random() for name in untried}
        return min(untried, key=lambda name: (self._unlike(name, wish), order[name]))

    def _unlike(self, name: str, wish: Mapping[str, str]) -> int:
        return sum(self.variants[name].get(key, "") != value for key, value in wish.items())

    def tell(self, told: Told, seconds: float) -> None:
        """Put on record what became of one, and what the search has taken by then."""
        from optuna.trial import TrialState, create_trial

        made = {key: self.variants[told.name].get(key, "") for key in self.distributions}
        state = TrialState.FAIL if told.values is None else TrialState.COMPLETE
        trial = create_trial(
            state=state,
            values=told.values,
            params=made,
            distributions=self.distributions,
            user_attrs={NAME: told.name},
            constraints=dict(told.broken) if told.values else None,
        )
        with _quiet():
            self.record.add_trial(trial)
        self._spent(seconds)

    def tell_measured(self, name: str, seconds: float) -> None:
        """Put on record that one was measured as a whole."""
        self.record.set_user_attr(WHOLE, [*self.measured, name])
        self._spent(seconds)

    def _spent(self, seconds: float) -> None:
        self.record.set_user_attr(SECONDS, seconds)


def features(specs: Mapping[str, Mapping[str, Any] | None]) -> Features:
    """Of a variant, by stage the keys of its choice; those of a stage that is left out are not there."""
    return {
        f"{stage}.{key}": value if isinstance(value, str) else json.dumps(value)
        for stage, keys in specs.items()
        for key, value in (keys or {"": "none"}).items()
    }


def _cut_half_a_line(path: Path) -> None:
    """What a kill or a full disk left at the end of a journal: Optuna passes it over, and would write behind it."""
    told = path.read_bytes() if path.exists() else b""
    if told and not told.endswith(b"\n"):
        path.write_bytes(told[: told.rfind(b"\n") + 1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's lines on what is experimental, and on every study that is made."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)
