"""Checkpoints of one training run, such as `step-1000` and `step-2000` side by side, and which of them are taken."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from featherweight.checkpoint.arrival import Arrival
from featherweight.errors import CheckpointError, RecipeError

TRAINER_STATE = "trainer_state.json"
_NUMBERED = re.compile(r"(?P<run>.*\D)(?P<number>\d+)")


@dataclass(frozen=True)
class Policy:
    """Which checkpoints of a training run are taken; one that stands alone is always.

    every: those whose number it divides. metric: where it is given, only the one that is best by it among those that are there.
    """

    every: int = 1
    metric: str | None = None

    @classmethod
    def of(cls, words: str) -> Self:
        """Read 'every', 'every:1000', 'best' (the lowest eval_loss) or 'best:METRIC'. Raises RecipeError."""
        kind, _, value = words.partition(":")
        if kind == "best":
            return cls(metric=value or "eval_loss")
        if kind != "every" or (value and not (value.isdigit() and int(value))):
            raise RecipeError(f"--take {words}: expected every, every:N, best or best:METRIC")
        return cls(every=int(value or 1))

    def taken(self, arrivals: Iterable[Arrival]) -> list[Arrival]:
        """The arrivals that are taken, in their order."""
        arrivals = list(arrivals)
        best = _best(arrivals, self.metric) if self.metric else {}
        return [one for one in arrivals if self._takes(one.source, best)]

    def _takes(self, source: str, best: Mapping[str, str]) -> bool:
        place = numbered(source)
        if place is None:
            return True
        return place[1] % self.every == 0 if self.metric is None else best.get(place[0]) == source


def _best(arrivals: Iterable[Arrival], metric: str) -> dict[str, str]:
    """The source of the best of each training run, the first of equals."""
    runs: dict[str, dict[str, float]] = {}
    for one in arrivals:
        place = numbered(one.source)
        if place is not None and (figure := _figure(one, metric)) is not None:
            runs.setdefault(place[0], {})[one.source] = figure
    choose = min if metric.endswith("loss") else max
    return {run: choose(figures, key=figures.__getitem__) for run, figures in runs.items()}


def numbered(source: str) -> tuple[str, int] | None:
    """The training run that a checkpoint belongs to, and its number there; None where its name ends with no number."""
    match = _NUMBERED.fullmatch(source.rstrip("/"))
    name = source.rstrip("/").rpartition("/")[2]
    if match is None or source.startswith(("models:", "hf:")) or not re.search(r"\d$", name) or name.isdigit():
        return None
    return match["run"], int(match["number"])


def _figure(arrival: Arrival, metric: str) -> float | None:
    """The metric that the trainer measured of this checkpoint, as transformers' Trainer writes it down; None where it did not."""
    state = trainer_state(arrival)
    told = state.get("log_history")
    steps = [entry for entry in (told if isinstance(told, list) else ()) if isinstance(entry, dict) and metric in entry]
    own = [entry[metric] for entry in steps if entry.get("step") == state.get("global_step")]
    return float(own[-1]) if own and isinstance(own[-1], int | float) and own[-1] == own[-1] else None


def trainer_state(arrival: Arrival) -> dict[str, Any]:
    """What transformers' Trainer wrote beside a checkpoint; empty where it wrote nothing that can be read."""
    from featherweight.checkpoint.files import read_json

    if arrival.listing is None or TRAINER_STATE not in arrival.listing.sizes:
        return {}
    try:
        return read_json(arrival.listing, TRAINER_STATE)
    except CheckpointError:
        return {}
