"""The workspace: begun by several commands at once, and what is published there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from featherweight.errors import IntegrityError, ServiceError
from featherweight.store.artifact import Manifest, describe_files, file_sha256, merkle_digest
from featherweight.store.workspace import ARTIFACT, Workspace, local_path
from tests.support.registering import empty_store

# Each waits for the others, so that all three open the workspace in the same moment.
BEGIN = """
import sys, time
from pathlib import Path
root = Path(sys.argv[1])
from featherweight.store.workspace import Workspace
from featherweight.system.environment import configure
from featherweight.system.services import prefect_server
configure(root)
import mlflow
(root.parent / f"ready-{sys.argv[2]}").touch()
while len(list(root.parent.glob("ready-*"))) < 3:
    time.sleep(0.01)
"""
TRACK = "workspace = Workspace.at(root); print(workspace.experiment(workspace.client(), 'the same'))"
SERVE = "\nwith prefect_server(root) as server: server.wait(); print('up')"


def three_at_once(folder: Path, code: str) -> list[str]:
    """What three processes print that begin on the same fresh workspace; each must end well."""
    env = {
        name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME")
    }
    command = [sys.executable, "-c", BEGIN + code, str(folder / "workspace")]
    started = [
        subprocess.Popen([*command, str(number)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    ended = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], [error[-1000:] for _, error in ended]
    return [said.strip() for said, _ in ended]


@pytest.mark.slow
def test_three_commands_begin_in_a_fresh_workspace_at_once(tmp_path: Path) -> None:
    assert three_at_once(tmp_path, TRACK) == ["1", "1", "1"]


@pytest.mark.slow
@pytest.mark.server
def test_three_servers_come_up_in_a_fresh_workspace_at_once(tmp_path: Path) -> None:
    assert three_at_once(tmp_path, SERVE) == ["up", "up", "up"]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = Workspace.at(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    return place


def made(workspace: Workspace) -> Path:
    """An artifact's folder as a stage leaves it."""
    folder = workspace.root / "work" / "made"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "weights").write_bytes(b"w" * 1000)
    (folder / "config.json").write_text("{}")
    files = describe_files(folder)
    told = {"spec": {}, "seed": 0, "parents": {}, "metrics": {}, "environment": {}, "machine": {}}
    times = {"started": "2026-11-01T00:00:00+00:00", "finished": "2026-11-01T00:00:01+00:00"}
    Manifest(digest=merkle_digest(files), files=files, stage="s", node="n", key="k", **told, **times).write(folder)
    return folder


def on_another_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Renaming `folder` fails as it does between two file systems."""
    rename = Path.rename

    def refusing(path: Path, target: Path) -> Path:
        if path == folder:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)


def test_databases_lie_in_the_workspace_whatever_it_is_called_or_it_is_refused(tmp_path: Path) -> None:
    """SQLite's address ends at a question mark: the databases of all folders that begin alike would be one file beside them."""
    for name in ("a b", "a#b", "a%20b", "a%3Fb", "a&b=c+d", "a'b", "é"):
        workspace = Workspace.at(tmp_path / name)
        (workspace.root / "mlflow.db").write_bytes(empty_store())
        workspace.experiment(workspace.client(), "ours")
        with closing(sqlite3.connect(workspace.root / "mlflow.db")) as database:
            assert ("ours",) in database.execute("SELECT name FROM experiments").fetchall()
    with pytest.raises(ServiceError, match=r"a\?b cannot be a workspace: .* question mark; take another folder"):
        Workspace.at(tmp_path / "a?b")
    assert not [path for path in tmp_path.iterdir() if path.is_file() or "?" in path.name]


@pytest.mark.slow
def test_an_artifact_goes_whole_to_another_file_system(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    client, folder = workspace.client(), made(workspace)
    run = client.create_run(workspace.experiment(client, "x"))
    place = local_path(run.info.artifact_uri)
    assert place is not None
    (place / f"{ARTIFACT}.part").mkdir(parents=True)  # left by a process that was killed
    (place / f"{ARTIFACT}.part" / "half").write_text("")
    on_another_disk(monkeypatch, folder)
    uri = workspace.publish(client, run.info.run_id, folder)
    assert uri == (place / ARTIFACT).as_uri()
    assert {path.name for path in place.rglob("*")} == {ARTIFACT, "deep", "weights", "config.json", "manifest.json"}


def test_a_disk_that_fills_up_half_way_leaves_nothing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    client, folder = workspace.client(), made(workspace)
    run = client.create_run(workspace.experiment(client, "x"))
    place = local_path(run.info.artifact_uri)
    assert place is not None

    def filling(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "half").write_text("")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    on_another_disk(monkeypatch, folder)
    monkeypatch.setattr(shutil, "copytree", filling)
    with pytest.raises(OSError, match="No space left"):
        workspace.publish(client, run.info.run_id, folder)
    assert list(place.iterdir()) == []
    assert folder.is_dir()


def test_a_file_that_this_user_may_not_read_is_told(tmp_path: Path) -> None:
    path, user = tmp_path / "weights", os.geteuid()
    path.write_bytes(b"1")
    path.chmod(0)
    try:
        os.seteuid(user or 65534)  # root may read everything
        with pytest.raises(IntegrityError, match="weights cannot be read by this user"):
            file_sha256(path)
    finally:
        os.seteuid(user)
