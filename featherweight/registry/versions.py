"""One registered model as it stands: its versions, its history, and how far what MLflow shows follows it.

The history is the truth. Aliases, stage tags and MLflow's own stages are read only in order to see whether they follow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from featherweight.errors import GateError, IntegrityError
from featherweight.registry import tag_history
from featherweight.registry.commit import Cell
from featherweight.registry.history import Action, Entry, GateResult, History, Move, Standing, fold

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.entities.model_registry import RegisteredModel as MlflowModel

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
OURS = (CHAMPION, "production", CHALLENGER, "staging", PREVIOUS)
"""The aliases that follow the history; `production` and `staging` are there for MLflow's page."""
TAG = "featherweight."
NAME = f"{TAG}name"
MARK = f"{TAG}history_head"


@dataclass(frozen=True)
class RegisteredVersion:
    """A registered version as the registry holds it.

    source: where its files lie. shown: what MLflow's page names as that. new: whether the call that returned it registered it.
    """

    model: str
    version: str
    stage: str
    aliases: tuple[str, ...]
    run_id: str
    source: str
    tags: Mapping[str, str]
    created_s: float
    shown: str = ""
    new: bool = False

    @classmethod
    def of(cls, found: ModelVersion, aliases: Mapping[str, str], stage: str = "none") -> RegisteredVersion:
        """MLflow's version, with the stage that the history gives it."""
        return cls(
            model=found.name,
            version=str(found.version),
            stage=stage,
            aliases=tuple(sorted(alias for alias, number in aliases.items() if number == str(found.version))),
            run_id=found.run_id or "",
            source=found.tags.get(f"{TAG}location") or found.source or "",
            tags=_texts(found.tags),
            created_s=(found.creation_timestamp or 0) / 1000,  # whoever writes to its database can take the time away
            shown=found.source or "",
        )

    @property
    def uri(self) -> str:
        """What `mlflow.pyfunc.load_model` takes."""
        return f"models:/{self.model}/{self.version}"

    @property
    def digest(self) -> str:
        """Digest of the served artifact."""
        return self.tag("digest")

    @property
    def variant(self) -> str:
        """Name of the variant."""
        return self.tag("variant")

    @property
    def metrics(self) -> dict[str, float]:
        """The measurement, as it was when the version was registered."""
        return json.loads(self.tag("metrics") or "{}")

    def tag(self, name: str) -> str:
        """A Featherweight tag of the version, '' where it has none."""
        return self.tags.get(f"{TAG}{name}", "")


@dataclass(frozen=True)
class RegisteredModel:
    """A registered model at one look.

    born: when MLflow created it, in ms: what tells it from a deleted one of its name. shown: the aliases as MLflow has them.
    stages: MLflow's own stage of each version, None on a server that has no stages. unvouched: numbers of entries that no trusted
    key signed, where one has to.
    """

    model: str
    born: int
    tags: Mapping[str, str]
    shown: Mapping[str, str]
    versions: Mapping[str, RegisteredVersion]
    stages: Mapping[str, str] | None
    history: History
    unvouched: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, holder: MlflowModel, found: Sequence[ModelVersion], stored: Mapping[int, str], has_stages: bool = True
    ) -> RegisteredModel:
        """What MLflow holds of a model: itself, its versions, and the stored entries of its history by number."""
        shown = {alias: str(number) for alias, number in holder.aliases.items()}
        tags = _texts(holder.tags)
        earlier, faults = tag_history.read(tags)
        before = tag_history.standing(earlier, shown) if earlier else Standing()
        told = fold(stored, holder.creation_timestamp or 0, earlier, before)
        told = replace(told, faults=(*faults, *told.faults, *_cut(told, tags.get(MARK, ""))))
        aliases = {alias: number for alias, number in shown.items() if alias not in OURS} | _named(told.standing)
        ordered = sorted(found, key=lambda one: int(one.version))
        versions = {str(one.version): RegisteredVersion.of(one, aliases, told.stage(str(one.version))) for one in ordered}
        stages = {str(one.version): str(one.current_stage) for one in ordered} if has_stages else None
        return cls(holder.name, holder.creation_timestamp or 0, tags, shown, versions, stages, told)

    @property
    def aliases(self) -> dict[str, str]:
        """Version numbers by alias: ours as the history has them, others as MLflow has them."""
        return {alias: n for alias, n in self.shown.items() if alias not in OURS} | _aliases(self.history.standing)

    def pick(self, version: str) -> RegisteredVersion:
        """A version by number or alias. Raises GateError, naming the known ones, where there is none."""
        number = self.aliases.get(version, version)
        found = self.versions.get(number)
        if found is None and version in self.aliases:
            left = ", ".join(self.versions) or "none"
            way = f"promote another (`featherweight promote {self.model}/NUMBER`; versions: {left}), or roll back"
            raise GateError(f"version {number} of '{self.model}', its {version}, was deleted in MLflow; {way}")
        if found is None:
            named = ", ".join(sorted(self.aliases)) or "none"
            known = f"versions: {', '.join(self.versions) or 'none'}; aliases: {named}"
            raise GateError(f"model '{self.model}' has no version or alias '{version}'; {known}")
        return found

    def holder(self, alias: str) -> RegisteredVersion | None:
        """The version that an alias names, None where there is none any more."""
        return self.versions.get(self.aliases.get(alias, ""))

    # -- what may be decided --------------------------------------------------------------------------------------------

    def transition(
        self, moved: RegisteredVersion, to: str, who: str, why: str, gates: Sequence[GateResult], rule: str = ""
    ) -> Entry:
        """The entry that moves a version to a stage, and whoever stands there to the stage below."""
        after, moves = self.history.standing.moved(moved.version, to)
        return replace(self._entry("transition", moves, after, who, why, tuple(gates)), rule=rule)

    def told(self, action: Action, who: str, why: str, gates: Sequence[GateResult] = ()) -> Entry:
        """An entry that moves nothing."""
        return self._entry(action, {}, self.history.standing, who, why, tuple(gates))

    def rollback(self, who: str, why: str) -> Entry:
        """The entry that makes `previous` champion. Raises GateError where there is no previous one, or it was deleted."""
        if not self.history.standing.previous:
            raise GateError(f"model '{self.model}' has no previous champion to go back to")
        self.pick(PREVIOUS)
        after, moves = self.history.standing.rolled_back()
        return self._entry("rollback", moves, after, who, why)

    def _entry(
        self, action: Action, moves: Mapping[str, str], after: Standing, who: str, why: str, gates: tuple[GateResult, ...] = ()
    ) -> Entry:
        told = tuple(Move(version, self._digest(version), self.history.stage(version), to) for version, to in moves.items())
        return Entry("", self.born, 0, "", "", who, why, action, told, after, gates)

    def _digest(self, version: str) -> str:
        return self.versions[version].digest if version in self.versions else ""

    # -- what follows ---------------------------------------------------------------------------------------------------

    def behind(self) -> list[tuple[Cell, str | None]]:
        """What MLflow shows otherwise than the history has it, and what it has to show; the new champion's alias comes first."""
        if not self.history.entries or self.cut:
            return []
        found, last = self._found(), self.history.entries[-1]
        left = {Cell(kind, name): value for kind, name, value in last.found} if last.left else {}
        wanted = self._wanted(self.history) | {cell: value for cell, value in left.items() if found.get(cell) == value}
        return [(cell, value) for cell, value in wanted.items() if found.get(cell) != value]

    def out_of_band(self) -> dict[Cell, str | None]:
        """The cells that somebody else moved, and what they show: what no entry makes of them that they may have followed.

        Those are the entries from the marked one on, or all where none is marked: a writer may have stopped before they followed.
        A version without a stage tag was made by hand, not moved. Nothing of a model that we did not register.
        """
        if self.cut or (NAME not in self.tags and not self.history.entries):
            return {}
        begun, found = int(self.tags.get(MARK, "0").partition(":")[0] or 0), self._found()
        follows = [self._wanted(self.history.until(0))] if not begun else []
        follows += [self._wanted(self.history.until(one.number)) for one in self.history.entries if one.number >= begun]
        known = {Cell(kind, name): value for one in self.history.entries if one.number > begun for kind, name, value in one.found}
        wanted = self.behind() if self.history.entries else follows[0].items()
        moved = [cell for cell, _ in wanted if cell.kind != "mark" and (cell.kind != "tag" or found.get(cell))]
        shown = {cell: found.get(cell) for cell in moved if all(found.get(cell) != one.get(cell) for one in follows)}
        return {cell: value for cell, value in shown.items() if cell not in known or known[cell] != value}

    def _wanted(self, history: History) -> dict[Cell, str | None]:
        """Every cell as a history makes it. No alias can name a version that was deleted."""
        held = _aliases(history.standing)
        wanted = {Cell("alias", one): held.get(one) for one in OURS if one not in held or held[one] in self.versions}
        for version, one in self.versions.items():
            stage = history.stage(version)
            if stage != "none" or one.digest or one.tag("stage"):  # of what others made, no tag says none as well
                wanted[Cell("tag", version)] = stage
            if self.stages is not None:
                wanted[Cell("stage", version)] = stage.capitalize()
        return wanted | ({Cell("mark", ""): mark(history.entries[-1])} if history.entries else {})

    def _found(self) -> dict[Cell, str | None]:
        tags = {Cell("tag", one.version): one.tag("stage") for one in self.versions.values()}
        stages = {Cell("stage", version): stage for version, stage in (self.stages or {}).items()}
        return {Cell("alias", a): n for a, n in self.shown.items()} | tags | stages | {Cell("mark", ""): self.tags.get(MARK)}

    def vouched_for(self, unvouched: Sequence[int]) -> RegisteredModel:
        """The same, with the numbers of the entries that no trusted key vouches for."""
        lines = [
            f"history entry {one.number} is signed by no key that is trusted here ({one.told()})"
            for one in self.history.entries
            if one.number in unvouched
        ]
        told = replace(self.history, faults=(*self.history.faults, *lines)) if lines else self.history
        return replace(self, history=told, unvouched=tuple(unvouched))

    @property
    def cut(self) -> list[str]:
        """What tells that the end of the history was removed, altered or forged, in words; empty where it may be believed."""
        forged = [f"history entry {number} is signed by no key that is trusted here" for number in self.unvouched]
        return [*_cut(self.history, self.tags.get(MARK, "")), *forged]

    def require_whole(self) -> None:
        """Raise IntegrityError where the end of the history was cut off, altered or forged: what was decided is not known then."""
        if self.unvouched:
            way = f"trust the key of who wrote it, or take it out (`featherweight audit {self.model} --repair`)"
            raise IntegrityError(f"{self.cut[-1]}; nothing is decided on it: {way}")
        if self.cut:
            raise IntegrityError(f"{self.cut[0]}; nothing is decided on it (`featherweight history {self.model} --repair`)")

    def repair(self, who: str, witnessed: str = "") -> Entry | None:
        """The entry that takes what is left of a cut history for the whole of it, None where nothing is known to be cut.

        witnessed: mark of an entry that was seen elsewhere and is not there.
        """
        marks = [*([self.tags[MARK]] if _cut(self.history, self.tags.get(MARK, "")) else []), *([witnessed] if witnessed else [])]
        numbers = " and ".join(sorted({one.partition(":")[0] for one in marks}))
        entry = self.told("repair", who, f"entry {numbers} was removed or altered: what is left counts")
        return replace(entry, mends=" ".join(marks)) if marks else None


def _texts(tags: Mapping[str, str | None]) -> dict[str, str]:
    """Tags as they were read: '' for one whose text was taken out of MLflow's database."""
    return {name: value or "" for name, value in tags.items()}


def mark(entry: Entry) -> str:
    """What the registered model says of the last entry that its aliases follow."""
    return f"{entry.number}:{entry.digest}"


def knows(entry: Entry, marked: str) -> bool:
    """Whether an entry is the marked one, or the repair that gave it up."""
    return marked == mark(entry) or marked in entry.mends.split()


def _cut(history: History, marked: str) -> list[str]:
    """What a mark tells of a history that does not hold the marked entry."""
    if not marked or any(knows(entry, marked) for entry in history.entries):
        return []
    return [f"history entry {marked.partition(':')[0]}, which the aliases followed, was removed or altered"]


def _named(standing: Standing) -> dict[str, str]:
    """The aliases that name the versions of a standing."""
    named = {CHAMPION: standing.champion, CHALLENGER: standing.challenger, PREVIOUS: standing.previous}
    return {alias: number for alias, number in named.items() if number}


def _aliases(standing: Standing) -> dict[str, str]:
    """All of our aliases that name a version."""
    held = {"production": standing.champion, "staging": standing.challenger}
    return _named(standing) | {alias: number for alias, number in held.items() if number}


def parse_reference(reference: str, default: str) -> tuple[str, str]:
    """'name', 'name@alias', 'name/3' or either with 'models:/' in front: (name, alias or number)."""
    plain = reference.removeprefix("models:/")
    for sign in ("@", "/"):
        name, found, version = plain.partition(sign)
        if found:
            return name, version
    return plain, default
