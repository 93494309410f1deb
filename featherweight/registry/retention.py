"""Retention: what nothing registered goes back to and no run uses is removed once it is old; never what is deployed or decided.

Kept are, with everything in their lineage, versions that any alias names, that stand in a stage, that the history speaks of, or
that are young; what a young optimization used; and, while an optimization runs, all. What is removed, its recipe makes again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from featherweight.errors import FeatherweightError, IntegrityError, one_line
from featherweight.measure.figures import mebibytes
from featherweight.registry.lineage import read_graph
from featherweight.registry.registry import Registry
from featherweight.registry.versions import RegisteredModel, RegisteredVersion
from featherweight.store.artifact import Manifest
from featherweight.store.mlflow_errors import mlflow_explained
from featherweight.store.removal import Folder, folder_at, freed
from featherweight.store.tracking import open_artifacts
from featherweight.store.workspace import ARTIFACT, Workspace, local_path
from featherweight.system.locks import locked_if_free
from featherweight.system.processes import has_ended
from featherweight.visible import in_lines

if TYPE_CHECKING:
    from mlflow.entities import Run

Kind = Literal["artifact", "version", "copy", "unfinished"]
OPTIMIZATIONS = "tags.featherweight.kind = 'optimization'"
COLLECTED = "featherweight.collected"
BEGUN = "begun"
RESULT = "result.json"
MARKERS: Mapping[Kind, str] = {"version": "MLmodel"}
LOCAL = {"cache": "copy", "work": "unfinished", "resume": "unfinished"}
"""Folders of a workspace, and what lies in them."""


@dataclass(frozen=True)
class Item:
    """Something that may go. run: of the stage that made it. size_bytes: under which it lies, also where other names keep them."""

    kind: Kind
    name: str
    uri: str
    size_bytes: int
    age_s: float
    run: str = ""

    def to_text(self) -> str:
        """In a line."""
        return f"{self.kind:<11}{self.name}  {self.age_s / 86400:.0f} days  {mebibytes(self.size_bytes)}"


@dataclass(frozen=True)
class Collection:
    """What goes, or went. kept: how many artifacts and versions stay, by why. held: why nothing goes now.

    left: what could not be looked at or removed, with the reason.
    """

    items: tuple[Item, ...] = ()
    freed_bytes: int = 0
    kept: Mapping[str, int] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    held: str = ""
    removed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "items": [asdict(one) for one in self.items]}

    def to_text(self) -> str:
        """What goes, a line each, then what stays and why."""
        held = [f"held: {self.held}; nothing is removed meanwhile"] if self.held else []
        kept = [f"{'kept':<11}{count}: {why}" for why, count in self.kept.items()]
        left = [f"left alone {one}" for one in self.left]
        return in_lines([*held, *(one.to_text() for one in self.items), *kept, *left, self._sum()])

    def _sum(self) -> str:
        if not self.items:
            return "nothing to remove"
        count = ", ".join(f"{number} of the kind {kind}" for kind, number in Counter(one.kind for one in self.items).items())
        told = f"{count}: {mebibytes(self.freed_bytes)}"
        return f"removed {told}" if self.removed else f"to be removed {told}{'' if self.held else ' (--yes removes them)'}"


def collect(workspace: Workspace, older_s: float, who: str, remove: bool = False) -> Collection:
    """What may go that is older than `older_s`; it goes where `remove` says so. Raises ServiceError, IntegrityError."""
    with locked_if_free(workspace.in_use) as free, mlflow_explained(workspace.tracking_uri, files=True):
        search = _Search(workspace, time.time() - older_s)
        held = "an optimization runs in this workspace" if not free else search.running()
        found = Collection(tuple(search.items()), 0, dict(search.kept), tuple(search.left), held)
        return _Removal(search, found, who).run(remove and not held)


class _Search:
    """One look at everything: the registry first, since a run registers what it made before it ends."""

    def __init__(self, workspace: Workspace, before_s: float) -> None:
        self.workspace, self.before_s = workspace, before_s
        self.registry = Registry(workspace.tracking_uri)
        self.registry.check()
        self.client = self.registry.client
        self.kept: Counter[str] = Counter()
        self.left: list[str] = []

    def items(self) -> Iterator[Item]:
        """What may go: versions, artifacts, and what lies in the workspace alone."""
        models = self.registry.all_models()
        versions = [version for model in models for version in self._candidates(model)]
        uris, digests = self._lineages(models, {(one.model, one.version) for one in versions})
        yield from (self._version(version) for version in versions)
        lately = self._used_lately()
        for run in self._stage_runs():
            if item := self._artifact(run, uris, digests, lately):
                yield item
        yield from self._local()

    def running(self) -> str:
        """That an optimization runs, in words; '' where none does, or those that seem to are dead on this machine."""
        for run in self._runs(f"attributes.status = 'RUNNING' AND {OPTIMIZATIONS}"):
            process = run.data.tags.get("featherweight.process", "")
            if not has_ended(process):
                return f"optimization {run.info.run_id} runs at {process.partition(':')[0] or 'another machine'}"
        return ""

    @cached_property
    def experiments(self) -> list[str]:
        return [one.experiment_id for one in self.client.search_experiments()]

    def _runs(self, wanted: str) -> Iterator[Run]:
        token = None
        while True:
            page = self.client.search_runs(self.experiments, wanted, max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _stage_runs(self) -> Iterator[Run]:
        ended = (run for run in self._runs("attributes.status != 'RUNNING'") if run.data.tags.get("featherweight.key"))
        return (run for run in ended if run.data.tags.get(COLLECTED, BEGUN) == BEGUN)

    def _candidates(self, model: RegisteredModel) -> Iterator[RegisteredVersion]:
        """The versions of a model that nothing names and nobody decided about, once they are old."""
        decided = spoken_of(model)
        for version in model.versions.values():
            if model.history.faults:
                self.kept["versions of models whose history does not hold together"] += 1
            elif version.version in decided:
                self.kept["versions that are deployed, named by an alias, or in the history"] += 1
            elif version.created_s >= self.before_s or not version.digest:
                self.kept["versions that are young" if version.digest else "versions that others registered"] += 1
            else:
                yield version

    def _lineages(self, models: Iterable[RegisteredModel], gone: set[tuple[str, str]]) -> tuple[set[str], set[str]]:
        """URIs and digests of all that the versions that stay go back to. Raises IntegrityError where one cannot be read."""
        uris: set[str] = set()
        digests: set[str] = set()
        stay = [one for model in models for one in model.versions.values() if (one.model, one.version) not in gone]
        for version in stay:
            if not version.tag("lineage"):
                continue
            try:
                nodes = read_graph(self.registry, version).nodes
            except FeatherweightError as error:
                raise IntegrityError(
                    f"what {version.uri} goes back to is not known, so that nothing is removed: {one_line(error)}"
                ) from error
            uris |= {node.uri for node in nodes}
            digests |= {node.digest for node in nodes} | {version.digest}
        return uris, digests

    def _used_lately(self) -> set[str]:
        """The runs whose artifacts a young optimization took."""
        since = int(self.before_s * 1000)
        runs = self._runs(f"attributes.end_time > {since} AND {OPTIMIZATIONS}")
        return {node["run_id"] for run in runs for node in self._result(run).get("nodes", ())}

    def _result(self, run: Run) -> dict[str, Any]:
        repository = open_artifacts(run.info.artifact_uri, self.workspace.tracking_uri)
        if not any(one.path == RESULT for one in repository.list_artifacts()):
            return {}
        with tempfile.TemporaryDirectory() as folder:
            return json.loads(Path(repository.download_artifacts(RESULT, folder)).read_text())

    def _version(self, version: RegisteredVersion) -> Item:
        size = self._size("version", version.source)
        return Item("version", f"{version.model}/{version.version}", version.source, size, time.time() - version.created_s)

    def _artifact(self, run: Run, uris: set[str], digests: set[str], lately: set[str]) -> Item | None:
        uri, ended = f"{run.info.artifact_uri}/{ARTIFACT}", (run.info.end_time or run.info.start_time) / 1000
        if why := self._stays(run, uri, ended, uris, digests, lately):
            self.kept[why] += 1
            return None
        size, node = self._size("artifact", uri), run.data.tags["featherweight.node"]
        return Item("artifact", node, uri, size, time.time() - ended, run.info.run_id) if size else None

    def _stays(self, run: Run, uri: str, ended: float, uris: set[str], digests: set[str], lately: set[str]) -> str:
        if uri in uris or self._digest(uri) in digests:
            return "artifacts that a registered version goes back to"
        if ended >= self.before_s:
            return "artifacts that are young"
        return "artifacts that a young optimization used" if run.info.run_id in lately else ""

    def _digest(self, uri: str) -> str:
        """Of an artifact that lies here; a remote one is known by its URI."""
        local = local_path(uri)
        try:
            return Manifest.read(local).digest if local else ""
        except IntegrityError:
            return ""

    def _size(self, kind: Kind, uri: str) -> int:
        """Bytes of a folder; 0 where it is not there, or is left alone."""
        try:
            return sum(one.size for one in self.folder(kind, uri).files())
        except (FeatherweightError, OSError) as error:
            self.left.append(one_line(f"{uri}: {error}"))
            return 0

    def folder(self, kind: Kind, uri: str) -> Folder:
        """Where an item lies. Raises IntegrityError where that is not in the store."""
        root = self.workspace.root
        store = root / "artifacts" if kind in ("artifact", "version") else root
        return folder_at(uri, store, self.workspace.tracking_uri, MARKERS.get(kind, "manifest.json"))

    def _local(self) -> Iterator[Item]:
        """Copies of remote artifacts, and what killed processes left, by when they were used last."""
        for place, kind in LOCAL.items():
            for path in sorted((self.workspace.root / place).glob("*")):
                age = time.time() - path.lstat().st_mtime
                if path.is_symlink() or not path.is_dir():
                    self.left.append(f"{path}: it is no folder")
                elif path.lstat().st_mtime < self.before_s:
                    size = self._size(kind, path.as_uri())  # type: ignore[arg-type]
                    yield Item(kind, f"{place}/{path.name[:16]}", path.as_uri(), size, age)  # type: ignore[arg-type]


class _Removal:
    """Hides what goes, looks once more whether a run began meanwhile, and then removes it.

    A run is known before it looks for anything: whichever began before the second look is seen by it, and whichever begins later
    finds nothing of what is hidden.
    """

    def __init__(self, search: _Search, found: Collection, who: str) -> None:
        self.search, self.found, self.who = search, found, who

    def run(self, remove: bool) -> Collection:
        """What went, or would."""
        pairs = [(item, self.search.folder(item.kind, item.uri)) for item in self.found.items]
        size = freed(one for _, folder in pairs for one in folder.files())
        found = replace(self.found, freed_bytes=size)
        return self._removed(found, pairs) if remove else found

    def _removed(self, found: Collection, pairs: list[tuple[Item, Folder]]) -> Collection:
        artifacts = [(item, folder) for item, folder in pairs if item.run]
        for item, folder in artifacts:
            self.search.client.set_tag(item.run, COLLECTED, BEGUN)
            folder.hide()
        if held := self.search.running():
            for item, folder in artifacts:
                folder.restore()
                self.search.client.delete_tag(item.run, COLLECTED)
            return replace(found, held=held)
        gone = [item for item, folder in pairs if self._remove(item, folder)]
        return replace(found, items=tuple(gone), left=tuple(self.search.left), removed=True)

    def _remove(self, item: Item, folder: Folder) -> bool:
        if item.kind == "version" and not self._unregister(*item.name.rsplit("/", 1)):
            self.search.left.append(f"{item.name}: somebody decided about it meanwhile")
            return False
        folder.hide()
        folder.remove()
        if item.run:
            self.search.client.set_tag(item.run, COLLECTED, f"{datetime.now(UTC).isoformat(timespec='seconds')} by {self.who}")
        return True

    def _unregister(self, model: str, number: str) -> bool:
        """Delete a version, unless somebody has decided about it since it was looked at."""
        if number in spoken_of(self.search.registry.model(model)):
            return False
        self.search.client.delete_model_version(model, number)
        return True


def spoken_of(model: RegisteredModel) -> set[str]:
    """Numbers of the versions that an alias names, that stand in a stage, or that the history speaks of."""
    history = model.history
    entries = [*history.entries, *(lost.entry for lost in history.lost)]
    moved = {move.version for entry in entries for move in entry.moves}
    stood = {number for entry in entries for number in (entry.after.champion, entry.after.challenger, *entry.after.line)}
    staged = {number for number, stage in (model.stages or {}).items() if stage.lower() != "none"}
    told = {transition.version for transition in history.transitions}
    return {*model.shown.values(), *model.aliases.values(), *history.stages, *moved, *stood, *staged, *told}
