"""The workspace: where runs, artifacts and results live. MLflow's artifact store is the only store."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from featherweight.errors import GateError, IntegrityError, ServiceError
from featherweight.store.artifact import MANIFEST, ArtifactRef, Manifest, verify
from featherweight.store.mlflow_errors import mlflow_explained
from featherweight.store.tracking import open_artifacts, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACT = "artifact"
SCRATCH_DAYS = 14


def was_used(root: Path) -> bool:
    """Whether there may be runs: a server is named, or something was optimized in the folder."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or (root / "mlflow.db").exists()


def require_able(root: Path) -> None:
    """Raises ServiceError where a workspace's databases would lie outside of it."""
    if "?" in str(root.absolute()):
        way = "take another folder, such as --workspace DIR"
        raise ServiceError(f"{root} cannot be a workspace: SQLite's address of its databases would end at the question mark; {way}")


def require_used(root: Path, sought: str) -> None:
    """Raises GateError where something is sought in a folder that nothing was optimized in: a look makes no workspace."""
    if not was_used(root):
        raise GateError(f"no {sought} in {root}, where nothing was optimized yet; run `featherweight optimize RECIPE` first")


@dataclass(frozen=True)
class Workspace:
    """`root` holds what is local: work in progress, the cache of remote artifacts, and by default the MLflow and Prefect stores."""

    root: Path
    tracking_uri: str

    @classmethod
    def at(cls, root: Path) -> Workspace:
        """The workspace in `root`, tracked by $MLFLOW_TRACKING_URI or by a SQLite file in it.

        Raises ServiceError where it cannot be made, or where its databases would lie outside of it.
        """
        root = root.absolute()
        require_able(root)
        try:
            for folder in ("work", "cache", "artifacts"):
                (root / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServiceError(f"cannot create the workspace {root}: {error.strerror}") from error
        return cls(root, os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}")

    @property
    def in_use(self) -> Path:
        """The file by whose lock an optimization holds what it may use, so that nothing of it is collected (see retention)."""
        return self.root / "in-use.lock"

    def client(self) -> MlflowClient:
        """A client of the tracking server, registry included."""
        return open_client(self.tracking_uri)

    def find_experiment(self, client: MlflowClient, name: str) -> str | None:
        """Id of the experiment of that name, None where there is none. Raises ServiceError where it was deleted by hand."""
        found = client.get_experiment_by_name(name)
        if found is None:
            return None
        if found.lifecycle_stage != "active":
            restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
            where = f"MLFLOW_TRACKING_URI={self.tracking_uri}"
            raise ServiceError(f"experiment '{name}' was deleted in MLflow; `{where} {restore}`, or give the recipe another name")
        return found.experiment_id

    def experiment(self, client: MlflowClient, name: str) -> str:
        """Id of the experiment of that name, made where there is none. Raises ServiceError where it was deleted by hand."""
        from mlflow.exceptions import MlflowException

        found = self.find_experiment(client, name)
        if found is not None:
            return found
        local = self.tracking_uri.startswith("sqlite:")
        try:
            return client.create_experiment(name, (self.root / "artifacts").as_uri() if local else None)
        except MlflowException:  # another process may have made it between the two calls
            found = self.find_experiment(client, name)
            if found is None:
                raise
            return found

    @contextmanager
    def working_folder(self) -> Iterator[Path]:
        """An empty folder beside the artifacts, gone afterwards unless it was published."""
        folder = Path(tempfile.mkdtemp(dir=self.root / "work"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def scratch_folder(self, key: str) -> Path:
        """The folder of a piece of work that may be killed and resumed, made where it is not there yet.

        Those that nobody has come back to for SCRATCH_DAYS are removed on the way.
        """
        base = self.root / "resume"
        folder = base / key[:32]
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        oldest = time.time() - SCRATCH_DAYS * 86400
        for other in base.iterdir():
            if other.stat().st_mtime < oldest:
                shutil.rmtree(other, ignore_errors=True)
        return folder

    def publish(self, client: MlflowClient, run_id: str, folder: Path) -> str:
        """Hand `folder` (manifest written) to the run's artifact store; returns its URI. A local store moves it."""
        base = client.get_run(run_id).info.artifact_uri
        local = local_path(base)
        if local is None:
            return self._upload(client, run_id, folder, base)
        local.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(local / ARTIFACT)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy_whole(folder, local / ARTIFACT)
        return (local / ARTIFACT).as_uri()

    def _upload(self, client: MlflowClient, run_id: str, folder: Path, base: str) -> str:
        """Everything but the manifest first, so that a manifest means a complete upload; then keep it as the cached copy."""
        manifest = Manifest.read(folder)
        (folder / MANIFEST).unlink()
        client.log_artifacts(run_id, str(folder), ARTIFACT)
        manifest.write(folder)
        client.log_artifact(run_id, str(folder / MANIFEST), ARTIFACT)
        cached = self.root / "cache" / manifest.digest
        if not cached.exists():
            folder.rename(cached)
        return f"{base}/{ARTIFACT}"

    def materialize(self, ref: ArtifactRef, check: bool = True) -> Path:
        """A local, verified folder with the artifact's files. Raises IntegrityError or ServiceError."""
        local = local_path(ref.uri)
        if local is not None:
            if check:
                verify(local, ref.digest)
            return local
        cached = self.root / "cache" / ref.digest
        if not cached.exists():
            self._download(ref, cached)
        else:
            with suppress(PermissionError):  # of somebody else, who keeps what is used by others as well
                os.utime(cached)
            if check:
                verify(cached, ref.digest)
        return cached

    def is_stored(self, ref: ArtifactRef) -> bool:
        """Whether a remote store has the artifact still, of which a copy may lie here; a local one is looked at when it is used."""
        if local_path(ref.uri) is not None:
            return True
        with mlflow_explained(self.tracking_uri, files=True):
            return any(one.path == MANIFEST for one in open_artifacts(ref.uri, self.tracking_uri).list_artifacts())

    def _download(self, ref: ArtifactRef, cached: Path) -> None:
        from mlflow.artifacts import download_artifacts

        missing = IntegrityError(f"artifact {ref.node} is not at {ref.uri} any more")
        with self.working_folder() as folder:
            with mlflow_explained(self.tracking_uri, missing, files=True):
                got = download_artifacts(artifact_uri=ref.uri, dst_path=str(folder), tracking_uri=self.tracking_uri)
            verify(Path(got), ref.digest)
            Path(got).rename(cached)


def _copy_whole(source: Path, target: Path) -> None:
    """Copy a folder to another file system: `target` is there whole or not at all, whenever this ends."""
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    try:
        shutil.copytree(source, part)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def local_path(uri: str) -> Path | None:
    """The local folder that a `file:` URI or a plain path names, None for a remote one."""
    parsed = urlparse(uri)
    if parsed.scheme not in ("", "file"):
        return None
    return Path(unquote(parsed.path))
