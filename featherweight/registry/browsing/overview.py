"""What the pages show of registered models: plain values of one look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from featherweight.measure.figures import MISSING, mebibytes, percent, times, with_interval
from featherweight.measure.goals import OBJECTIVE, QUALITY, SIZE, judged_batch, speed
from featherweight.registry.history import History, Transition
from featherweight.registry.out_of_band import out_of_step
from featherweight.registry.promotion import answered
from featherweight.registry.versions import CHALLENGER, CHAMPION, PREVIOUS, RegisteredModel, RegisteredVersion

HELD = (CHAMPION, CHALLENGER, PREVIOUS)


@dataclass(frozen=True)
class VersionLine:
    """One version in a table. waits: for a person's approval, by its recipe's word."""

    number: str
    variant: str
    engine: str
    stage: str
    aliases: tuple[str, ...]
    quality: str
    speed: str
    size: str
    run_id: str
    waits: bool

    @classmethod
    def of(cls, version: RegisteredVersion, seen: RegisteredModel) -> VersionLine:
        """As it was measured and stands."""
        shown = _shown(version)
        waits = version.stage == "staging" and _wants_approval(version) and not answered(seen, version.version)
        told = (version.variant, version.tag("engine"), version.stage, version.aliases)
        return cls(version.version, *told, *shown, version.run_id, waits)


@dataclass(frozen=True)
class ModelLine:
    """A registered model. versions: newest first. faults: what does not hold together, in words. behind: what MLflow shows else."""

    name: str
    versions: tuple[VersionLine, ...]
    history: History
    faults: tuple[str, ...]
    behind: str

    @classmethod
    def of(cls, seen: RegisteredModel) -> ModelLine:
        """Of one look, which changes nothing and reads no file."""
        lines = tuple(VersionLine.of(one, seen) for one in reversed(list(seen.versions.values())))
        faults = tuple(dict.fromkeys((*seen.cut, *seen.history.faults)))
        return cls(seen.model, lines, seen.history, faults, out_of_step(seen))

    def holder(self, alias: str) -> VersionLine | None:
        """The version that holds an alias of ours."""
        return next((one for one in self.versions if alias in one.aliases), None)

    @property
    def held(self) -> list[tuple[str, VersionLine]]:
        """Our aliases and who holds them."""
        return [(alias, one) for alias in HELD for one in [self.holder(alias)] if one is not None]

    @property
    def waiting(self) -> list[VersionLine]:
        """Those that a person is to approve or refuse."""
        return [one for one in self.versions if one.waits]

    @property
    def candidates(self) -> list[VersionLine]:
        """Those that were never decided about, or stand in staging."""
        moved = self.history.stages
        return [one for one in self.versions if one.stage == "staging" or one.number not in moved]

    @property
    def transitions(self) -> list[Transition]:
        """Newest first."""
        return list(reversed(self.history.transitions))


def _shown(version: RegisteredVersion) -> tuple[str, str, str]:
    """Change of quality, speed and size as people read them; missing where somebody wrote something else into the tags."""
    shows = (percent, times, mebibytes)
    try:
        metrics = {name: float(value) for name, value in dict(version.metrics).items()}
        figures = (QUALITY, speed(judged_batch(version.tag("objective") or OBJECTIVE, metrics)), SIZE)
        found = [figure.read(metrics) for figure in figures]
    except (ValueError, TypeError):
        found = [None, None, None]
    quality, fast, size = (with_interval(one, show) if one else MISSING for one, show in zip(found, shows, strict=True))
    return quality, fast, size


def _wants_approval(version: RegisteredVersion) -> bool:
    """Whether the recipe that is told of a version asks for a person: what decides is the verified one, at the gate."""
    text = version.tag("recipe")
    if "approval" not in text:
        return False
    try:
        tree: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    promote = tree.get("promote") if isinstance(tree, Mapping) else None
    return isinstance(promote, Mapping) and promote.get("approval") == "required"
