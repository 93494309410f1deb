"""A registered version's files in a private folder, verified there: what is changed in the store afterwards is never loaded."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from featherweight.errors import IntegrityError, ServiceError
from featherweight.measure.batching import Batching
from featherweight.measure.goals import OBJECTIVE, judged_batching, judged_threads
from featherweight.registry.answering import served_task
from featherweight.registry.attestation import BY_MLFLOW, attested, folder_faults
from featherweight.registry.keys import Keys
from featherweight.registry.lineage import LineageGraph, read_graph
from featherweight.registry.model_folder import SERVED, opened, write_model_folder
from featherweight.registry.registry import RegisteredVersion, Registry
from featherweight.registry.versions import RegisteredModel
from featherweight.spec import Task
from featherweight.store import artifact
from featherweight.store.served_folder import Serving, verified_tokens
from featherweight.system.processes import is_running, process_name

OWNER = "owner"


@dataclass(frozen=True)
class VerifiedCopy:
    """A version, and an MLflow model's folder with its verified files.

    threads: what was measured to be best at what its objective is judged at. batching: what was chosen under requests at a rate,
    else the largest batch that was measured.
    """

    version: RegisteredVersion
    folder: Path
    threads: int
    batching: Batching
    max_tokens: int
    task: Task

    @property
    def served(self) -> Path:
        """The engine's files."""
        return self.folder / SERVED

    @property
    def opened(self) -> dict[str, float]:
        """The settings of the copy as MLflow takes them; for `max_tokens` the folder itself is asked."""
        return opened(self.threads, self.batching)

    @property
    def serving(self) -> Serving:
        """What its engine is told."""
        return Serving.read(self.served)


def private_folder(root: Path) -> Path:
    """A new folder for its owner's eyes below `root`; what processes left there that were killed is removed."""
    root.mkdir(parents=True, exist_ok=True)
    for other in root.iterdir():
        owner = other / OWNER
        if owner.is_file() and is_running(owner.read_text()) is False:
            shutil.rmtree(other, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=root))
    (folder / OWNER).write_text(process_name())
    return folder


def verified_copy(registry: Registry, seen: RegisteredModel, version: RegisteredVersion, folder: Path) -> VerifiedCopy:
    """Copy a version into the new folder `folder` and verify the copy: lineage, served files and, where keys are trusted, all.

    Without keys nothing vouches for what MLflow put around the served files (the code that loads them): it is written anew. How
    the engine is opened is what the verified lineage tells of the measurement. Raises IntegrityError naming what differs.
    """
    keys, graph = Keys.here(), read_graph(registry, version)
    if graph.served != version.digest:
        raise IntegrityError(f"the lineage of {version.uri} is of another artifact than the registered one")
    if keys.public and not attested(version, seen.born, keys):
        raise IntegrityError(f"no trusted key attests that {version.uri} is what it says; see `featherweight audit {seen.model}`")
    _fetch(registry, version, folder, whole=bool(keys.public))
    if faults := folder_faults(folder, keys) if keys.public else {}:
        told = ", ".join(f"{name} ({word})" for name, word in sorted(faults.items()))
        raise IntegrityError(f"{version.uri} is not what was signed: {told}")
    _verify_served(version, folder)
    copy = _copy_of(version, folder, graph)
    if not keys.public:
        _write_around(copy, registry.lineage_json(version), graph.run_id)
    return copy


def _fetch(registry: Registry, version: RegisteredVersion, folder: Path, whole: bool) -> None:
    """The version's files in `folder`: all, or the served ones alone."""
    source = registry.model_folder(version, folder)
    if source != folder:
        _copy(source if whole else source / SERVED, folder if whole else folder / SERVED)
        return
    for path in [] if whole else [one for one in folder.iterdir() if one.name != SERVED.partition("/")[0]]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _copy(source: Path, target: Path) -> None:
    """Copy plain files alone. Raises IntegrityError for what is none, which might not end or lead elsewhere."""
    if not source.is_dir():
        raise IntegrityError(f"{source} is not there; the registered files were removed")
    target.mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(source):
        if entry.name == BY_MLFLOW:
            continue
        place = target / entry.name
        if entry.is_dir(follow_symlinks=False):
            _copy(Path(entry.path), place)
        elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            _copy_file(Path(entry.path), place)
        else:
            raise IntegrityError(f"{entry.path} is no plain file; it was put there after the version was registered")


def _copy_file(source: Path, place: Path) -> None:
    try:
        shutil.copyfile(source, place, follow_symlinks=False)
    except OSError as error:
        raise ServiceError(f"cannot copy {source} to {place.parent}: {error.strerror or error}") from error


def _verify_served(version: RegisteredVersion, folder: Path) -> None:
    try:
        artifact.verify(folder / SERVED, version.digest)
    except IntegrityError as error:
        reason = str(error).partition(": ")[2] or str(error)
        raise IntegrityError(f"{version.uri} is not what was registered: {reason}".replace(str(folder), "its folder")) from error


def _copy_of(version: RegisteredVersion, folder: Path, graph: LineageGraph) -> VerifiedCopy:
    objective = str(graph.recipe_tree.get("objective") or OBJECTIVE)
    return VerifiedCopy(
        version=version,
        folder=folder,
        threads=judged_threads(objective, graph.metrics),
        batching=judged_batching(graph.metrics),
        max_tokens=verified_tokens(folder / SERVED),
        task=served_task(folder / SERVED),
    )


def _write_around(copy: VerifiedCopy, lineage: str, run_id: str) -> None:
    """What MLflow loads the served files with, as this installation writes it."""
    with tempfile.TemporaryDirectory(dir=copy.folder.parent) as scratch:
        around = Path(scratch) / "model"
        write_model_folder(
            around,
            engine=copy.serving.engine,
            digest=copy.version.digest,
            size_bytes=0,
            config=copy.opened,
            lineage=lineage,
            model_id=copy.version.tag("model_id"),
            run_id=run_id,
            task=copy.task,
        )
        shutil.copytree(around, copy.folder, dirs_exist_ok=True)
