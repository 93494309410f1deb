"""Retention: what may go and what stays, whatever runs meanwhile, and whoever put links into the store."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from featherweight.errors import IntegrityError
from featherweight.recipe.plan import expand
from featherweight.recipe.reading import load_recipe
from featherweight.registry import retention
from featherweight.registry.lineage import from_registry, verify
from featherweight.registry.registry import Registry
from featherweight.registry.retention import COLLECTED, Collection, collect
from featherweight.store.artifact import ArtifactRef, Manifest
from featherweight.store.removal import LocalFolder
from featherweight.store.workspace import Workspace, local_path
from featherweight.system.locks import locked_file
from featherweight.system.progress_channel import ProgressChannel
from tasks.parent_run import open_parent_run
from tests.conftest import S3Server
from tests.support.paths import TINY_RECIPE
from tests.support.registering import MODEL, Bench
from tests.support.stores import new_workspace

pytestmark = pytest.mark.slow
ALL = -60.0
"""Older than a minute from now: everything."""


@dataclass(frozen=True)
class Shelf(Bench):
    """A bench whose artifacts lie where stages publish them."""

    workspace: Workspace = field(kw_only=True)

    def publish(self, folder: Path, name: str, stage: str = "export", **told: Any) -> tuple[ArtifactRef, Manifest]:
        ref, manifest = super().publish(folder, name, stage, **told)
        client, tags = self.registry.client, {"featherweight.node": name, "featherweight.key": name}
        run = client.create_run(self.experiment, tags=tags).info.run_id
        uri = self.workspace.publish(client, run, folder)
        client.set_terminated(run)
        return ref.model_copy(update={"uri": uri, "run_id": run}), manifest

    def collect(self, remove: bool = False, older_s: float = ALL) -> Collection:
        return collect(self.workspace, older_s, "ada", remove)

    def runs(self, **tags: str) -> str:
        """An optimization that is running."""
        told = {"featherweight.kind": "optimization", **tags}
        return self.registry.client.create_run(self.experiment, tags=told).info.run_id


def shelf_in(root: Path, artifacts: str = "") -> Shelf:
    workspace = new_workspace(root)
    registry = Registry(workspace.tracking_uri)
    experiment = registry.client.create_experiment("made", artifacts or (root / "artifacts").as_uri())
    run = registry.client.create_run(experiment).info.run_id
    registry.client.set_terminated(run)
    return Shelf(registry, run, experiment, root, workspace=workspace)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return shelf_in(tmp_path / "ws")


def folder_of(ref: ArtifactRef) -> Path:
    found = local_path(ref.uri)
    assert found is not None
    return found


def names(found: Collection) -> list[str]:
    return sorted(one.name for one in found.items)


def test_what_nobody_decided_about_goes_and_what_is_deployed_stays_whole(shelf: Shelf) -> None:
    shelf.registry.register(shelf.winner("a/torch"))
    shelf.registry.transition(MODEL, "1", "production", who="ada", why="a test")
    shelf.registry.register(shelf.winner("b/torch"))
    stray, _ = shelf.artifact("stray")
    assert shelf.collect(older_s=3600).items == ()

    told = shelf.collect()
    assert names(told) == ["b/torch", "b/torch/evaluate", f"{MODEL}/2", "stray"]
    assert folder_of(stray).is_dir() and "(--yes removes them)" in told.to_text() and not told.removed
    assert told.freed_bytes < sum(one.size_bytes for one in told.items), "the version's files are links to the artifact's"

    source = shelf.registry.get(MODEL, "2").source
    done = shelf.collect(remove=True)
    assert (names(done), done.freed_bytes, done.removed) == (names(told), told.freed_bytes, True)
    assert not folder_of(stray).exists() and not Path(local_path(source) or "").exists()
    assert [one.version for one in shelf.registry.versions(MODEL)] == ["1"]
    assert {one.state for one in verify(from_registry(shelf.registry, MODEL), shelf.registry)} == {"ok"}
    assert shelf.registry.client.get_run(stray.run_id).data.tags[COLLECTED].endswith("by ada")
    assert shelf.collect(remove=True).items == ()


def test_an_alias_a_stage_and_the_history_keep_a_version(shelf: Shelf) -> None:
    for name in ("a", "b", "c"):
        shelf.registry.register(shelf.winner(f"{name}/torch"))
    shelf.registry.client.set_registered_model_alias(MODEL, "mine", "1")
    shelf.registry.transition(MODEL, "2", "staging", who="ada", why="a test")
    shelf.registry.transition(MODEL, "2", "none", who="ada", why="no more")
    assert names(shelf.collect()) == ["c/torch", "c/torch/evaluate", f"{MODEL}/3"]


def test_while_an_optimization_runs_nothing_goes(shelf: Shelf) -> None:
    stray, _ = shelf.artifact("stray")
    with locked_file(shelf.workspace.in_use, shared=True):
        assert "in this workspace" in shelf.collect(remove=True).held
    run = shelf.runs(**{"featherweight.process": f"elsewhere:{os.getpid()}"})
    held = shelf.collect(remove=True)
    assert f"{run} runs at elsewhere" in held.held and names(held) == ["stray"] and not held.removed
    assert folder_of(stray).is_dir()
    shelf.registry.client.set_tag(run, "featherweight.process", f"{socket.gethostname()}:{2**22 + 1}")
    assert shelf.collect(remove=True).removed and not folder_of(stray).exists()


def test_an_optimization_holds_its_workspace(shelf: Shelf) -> None:
    recipe = load_recipe(TINY_RECIPE)
    with open_parent_run(recipe, expand(recipe), shelf.workspace, ProgressChannel(), {}):
        assert "in this workspace" in shelf.collect(remove=True).held
    assert not shelf.collect().held


def test_a_run_that_begins_in_the_middle_finds_everything_as_it_was(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    stray, manifest = shelf.artifact("stray")
    look, looks = retention._Search.running, []

    def running(search: Any) -> str:
        looks.append(folder_of(stray).is_dir())
        if len(looks) == 2:
            shelf.runs()
        return look(search)

    monkeypatch.setattr(retention._Search, "running", running)
    assert shelf.collect(remove=True).held and looks == [True, False]
    assert shelf.workspace.materialize(stray) == folder_of(stray) and Manifest.read(folder_of(stray)) == manifest
    assert COLLECTED not in shelf.registry.client.get_run(stray.run_id).data.tags


def test_what_was_begun_and_killed_is_ended_the_next_time(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    stray, _ = shelf.artifact("stray")
    killed = iter(["", KeyboardInterrupt])

    def running(search: Any) -> str:
        said = next(killed)
        if said:
            raise said  # type: ignore[misc]
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(retention._Search, "running", running)
        with pytest.raises(KeyboardInterrupt):
            shelf.collect(remove=True)
    assert not folder_of(stray).exists() and list(folder_of(stray).parent.iterdir())
    assert names(shelf.collect(remove=True)) == ["stray"] and not list(folder_of(stray).parent.iterdir())


def test_where_a_lineage_cannot_be_read_nothing_goes(shelf: Shelf) -> None:
    shelf.registry.register(shelf.winner("a/torch"))
    shelf.registry.transition(MODEL, "1", "staging", who="ada", why="a test")
    place = Path(local_path(shelf.registry.get(MODEL, "1").source) or "")
    (place / "lineage.json").write_text("{}")
    stray, _ = shelf.artifact("stray")
    with pytest.raises(IntegrityError, match="so that nothing is removed"):
        shelf.collect(remove=True)
    assert folder_of(stray).is_dir()


def test_no_link_leads_out_of_the_store(shelf: Shelf, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (victim / "artifact").mkdir(parents=True)
    (victim / "artifact" / "precious").write_text("mine")
    itself, above, inside = (folder_of(shelf.artifact(name)[0]) for name in ("itself", "above", "inside"))
    itself.rename(tmp_path / "away")
    itself.symlink_to(victim / "artifact")
    above.parent.rename(tmp_path / "away-too")
    above.parent.symlink_to(victim)
    (inside / "folder").symlink_to(victim)
    (inside / "file").symlink_to(victim / "artifact" / "precious")
    (shelf.workspace.root / "cache" / "link").symlink_to(victim)
    client = shelf.registry.client
    elsewhere = client.create_experiment("elsewhere", victim.as_uri())
    run = client.create_run(elsewhere, tags={"featherweight.key": "k", "featherweight.node": "outside"}).info
    client.set_terminated(run.run_id)
    outside = Path(local_path(run.artifact_uri) or "") / "artifact"
    outside.mkdir(parents=True)
    (outside / "precious").write_text("mine too")

    done = shelf.collect(remove=True)
    assert names(done) == ["inside"] and not inside.exists()
    assert len(done.left) == 4 and all("left alone" in one or "is no folder" in one for one in done.left)
    assert (victim / "artifact" / "precious").read_text() == "mine" and (outside / "precious").read_text() == "mine too"


def test_a_store_by_another_name_is_the_store_and_a_link_in_it_is_not(tmp_path: Path) -> None:
    store, other = tmp_path / "store", tmp_path / "other"
    (store / "a").mkdir(parents=True)
    (store / "a" / "file").write_text("x")
    other.symlink_to(store)
    (store / "again").symlink_to(store)
    assert [len(LocalFolder(one, two / "a").files()) for one, two in ((store, other), (other, store))] == [1, 1]
    with pytest.raises(IntegrityError):
        LocalFolder(store, store / "again" / "a").files()
    with pytest.raises(IntegrityError, match="outside the store"):
        LocalFolder(store / "a", store / "b")


def test_copies_and_unfinished_work_go_by_when_they_were_used_last(shelf: Shelf) -> None:
    root = shelf.workspace.root
    old = time.time() - 40 * 86400
    for name in ("cache/old", "cache/new", "work/old", "resume/old"):
        (root / name).mkdir(parents=True)
        (root / name / "file").write_text("x" * 100)
        if name.endswith("old"):
            os.utime(root / name, (old, old))
    done = shelf.collect(remove=True, older_s=30 * 86400)
    assert names(done) == ["cache/old", "resume/old", "work/old"] and done.freed_bytes == 300
    assert [path.name for path in (root / "cache").iterdir()] == ["new"] and not list((root / "work").iterdir())


def test_an_s3_store_is_collected_too(tmp_path: Path, s3_server: S3Server) -> None:
    shelf = shelf_in(tmp_path / "ws", f"s3://{s3_server.bucket}/runs")
    stray, _ = shelf.artifact("stray")
    beside = s3_server.folder / stray.uri.partition(f"{s3_server.bucket}/")[2].replace("/artifact", "/artifact-of-others")
    beside.mkdir(parents=True)
    (beside / "file").write_text("theirs")
    assert shelf.workspace.is_stored(stray)
    told = shelf.collect()
    assert "stray" in names(told) and told.freed_bytes > 0 and shelf.workspace.is_stored(stray)
    shelf.runs()
    assert shelf.collect(remove=True).held and shelf.workspace.is_stored(stray)
    for run in shelf.registry.client.search_runs([shelf.experiment], "attributes.status = 'RUNNING'"):
        shelf.registry.client.set_terminated(run.info.run_id)
    assert shelf.collect(remove=True).removed
    assert not shelf.workspace.is_stored(stray) and (beside / "file").read_text() == "theirs"
