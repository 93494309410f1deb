"""`featherweight` alone: what it says to do next, as the folder and its workspace stand, and how little it takes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flows.next_step import Standing, look, told
from tests.support.registering import MODEL, Bench, desk

__all__ = ["desk"]

RECIPE = "name: mine\ncheckpoint: {source: x}\npromote: {model: mine}\n"


def commands(standing: Standing) -> list[str]:
    return [step.command for step in standing.steps()]


def optimization(desk: Bench, status: str, **tags: str) -> None:
    """A run of `optimize`, as it is left."""
    client = desk.registry.client
    named = {f"featherweight.{name}": value for name, value in {"kind": "optimization", "recipe": "mine", **tags}.items()}
    run = client.create_run(desk.experiment, tags=named)
    client.set_terminated(run.info.run_id, status)


def test_a_folder_without_a_recipe_and_one_with(tmp_path: Path) -> None:
    workspace = tmp_path / ".featherweight"
    (tmp_path / "other.yaml").write_text("name: x\nservices: {}\n")
    assert commands(look(tmp_path, workspace)) == ["featherweight init", "featherweight demo"]
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "a.yaml").write_text(RECIPE)
    assert commands(look(tmp_path, workspace))[0] == "featherweight plan recipes/a.yaml"
    (tmp_path / "b.yml").write_text(RECIPE)
    assert commands(look(tmp_path, workspace)) == ["featherweight plan b.yml", "featherweight optimize b.yml"]
    assert not workspace.exists()


@pytest.mark.slow
def test_a_workspace_tells_what_ran_and_what_waits(desk: Bench, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    optimization(desk, "FAILED", error="no text")
    assert commands(look(tmp_path, tmp_path)) == ["featherweight optimize mine.yaml"]
    assert "the latest run, of mine, failed: no text" in told(look(tmp_path, tmp_path))
    optimization(desk, "FINISHED", winner="w8/torch")
    assert commands(look(tmp_path, tmp_path)) == ["featherweight variants"]
    for name, promote in (("a/torch", {"approval": "required"}), ("b/torch", {})):
        version = desk.registry.register(desk.winner(name, promote))
        desk.registry.transition(MODEL, version.version, "staging", who="ada", why="a test")
        verb = "approve" if promote else "promote"
        assert commands(look(tmp_path, tmp_path))[0].startswith(f"featherweight {verb} {MODEL}/{version.version} ")
    desk.registry.transition(MODEL, "2", "production", who="ada", why="a test")
    assert commands(look(tmp_path, tmp_path))[-1] == f"featherweight serve {MODEL}"


@pytest.mark.slow
def test_a_run_whose_process_is_gone_was_stopped(desk: Bench, tmp_path: Path) -> None:
    ours = {"featherweight.kind": "optimization", "featherweight.process": f"{socket.gethostname()}:{os.getpid()}"}
    client = desk.registry.client
    run = client.create_run(desk.experiment, tags=ours).info.run_id
    assert commands(look(tmp_path, tmp_path)) == ["featherweight ui"]
    client.set_tag(run, "featherweight.process", f"{socket.gethostname()}:{2**22 + 1}")
    assert commands(look(tmp_path, tmp_path)) == ["featherweight optimize RECIPE"]


def test_what_cannot_be_read_is_told_and_a_server_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database at all" * 100)
    assert "cannot be read" in told(look(tmp_path, tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:secret@127.0.0.1:9")
    there = told(look(tmp_path, tmp_path))
    assert "runs and versions are at http://***@127.0.0.1:9" in there and "secret" not in there


@pytest.mark.slow
def test_it_is_the_command_alone_that_says_so_and_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = "{'torch', 'mlflow', 'prefect', 'sqlalchemy', 'yaml'}"
    code = f"import sys; sys.argv[1:] = []\nfrom flows.cli import main\ntry: main()\nfinally: print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "featherweight init" in done.stdout and done.stdout.splitlines()[-1] == "set()"
    asked = {"_FEATHERWEIGHT_COMPLETE": "complete_bash", "COMP_WORDS": "featherweight adv", "COMP_CWORD": "1"}
    program = "import sys; sys.argv = ['featherweight']\nfrom flows.cli import main\nmain()"
    told = subprocess.run([sys.executable, "-c", program], env=os.environ | asked, capture_output=True, text=True, timeout=300)
    assert told.stdout.split() == ["advise"]
