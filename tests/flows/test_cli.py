"""The front door: exit codes, one-line errors, JSON, and what refuses before anything starts."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from featherweight.store.workspace import Workspace
from flows import cli
from flows.cli import app
from tests.support.command import command_here
from tests.support.paths import ROOT
from tests.support.registering import empty_store

RECIPES = ROOT / "recipes"


def call(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command, as a user calls it."""
    command = str(Path(sys.executable).with_name("featherweight"))
    env = {**os.environ, **environment}
    return subprocess.run([command, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line that a refusal is; nothing on standard output."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("featherweight: ")
    return lines[0]


@pytest.fixture
def demo(tmp_path: Path) -> dict:
    return yaml.safe_load((RECIPES / "demo.yaml").read_text())


def saved(tree: dict, folder: Path) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return "recipe.yaml"


@pytest.mark.slow
def test_plan_prints_the_tree_and_runs_nothing(tmp_path: Path) -> None:
    done = command_here("plan", "recipes/demo.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "half/quarter/qat4/ort4" in done.stdout
    assert "ruled out" in done.stdout
    assert "if every variant paid for itself alone" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_plan_speaks_json_and_takes_overrides(tmp_path: Path) -> None:
    done = command_here("plan", str(RECIPES / "demo.yaml"), "--json", "--set", "variants=[{serve: ort}]", cwd=tmp_path)
    tree = json.loads(done.stdout)
    assert tree["variants"] == ["baseline", "ort"]
    assert tree["seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["optimize", "plan"])
def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path, demo: dict, command: str) -> None:
    demo["constrains"] = demo.pop("constraints")
    line = refused(command_here(command, saved(demo, tmp_path), cwd=tmp_path), 2)
    assert "did you mean 'constraints'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.slow
def test_an_impossible_recipe_is_refused_before_anything_starts(tmp_path: Path, demo: dict) -> None:
    demo["variants"] = [{"quantize": "qat4", "serve": "ct2-int8"}]
    line = refused(command_here("optimize", saved(demo, tmp_path), cwd=tmp_path), 2)
    assert "CTranslate2 packs int8 and float only" in line
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.slow
def test_a_dead_mlflow_or_prefect_server_is_named(tmp_path: Path) -> None:
    recipe = str(RECIPES / "demo.yaml")
    line = refused(command_here("optimize", recipe, "-q", cwd=tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:9"), 6)
    assert "MLflow server at http://127.0.0.1:9" in line
    line = refused(command_here("optimize", recipe, "-q", cwd=tmp_path, PREFECT_API_URL="http://127.0.0.1:9/api"), 6)
    assert "Prefect server at http://127.0.0.1:9/api" in line
    line = refused(command_here("variants", cwd=tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:9"), 6)
    assert "MLflow" in line


@pytest.mark.slow
@pytest.mark.usefixtures("named_prefect")
def test_a_deleted_experiment_is_told_by_a_look_for_checkpoints_too(tmp_path: Path, demo: dict) -> None:
    (tmp_path / ".featherweight").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".featherweight" / "mlflow.db").write_bytes(empty_store())
    client = Workspace.at(tmp_path / ".featherweight").client()
    client.delete_experiment(client.create_experiment(demo["name"]))
    done = command_here("watch", "checkpoints", "--recipe", saved(demo, tmp_path), "--once", "-q", cwd=tmp_path)
    assert done.returncode == 6, done.stderr
    assert f"experiment '{demo['name']}' was deleted in MLflow" in done.stderr.splitlines()[-1]


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import cli

    def full() -> None:
        with Path("/dev/full").open("w") as device:
            device.write("x" * 2**16)

    monkeypatch.setattr(cli, "app", full)
    line = refused(command_here("variants", cwd=tmp_path), 6)
    assert line == "featherweight: No space left on device; make room, and the same command goes on where it was"


@pytest.mark.slow
def test_passwords_of_addresses_are_not_shown(tmp_path: Path) -> None:
    recipe, address = str(RECIPES / "demo.yaml"), "://ada:hunter2@127.0.0.1:9"
    for name, scheme in {"MLFLOW_TRACKING_URI": "http", "PREFECT_API_URL": "https"}.items():
        for flags in ((), ("--debug",)):
            done = command_here(*flags, "optimize", recipe, "-q", cwd=tmp_path, **{name: f"{scheme}{address}"})
            assert done.returncode == 6
            assert f"{scheme}://***@127.0.0.1:9" in done.stderr
            assert "hunter2" not in done.stdout + done.stderr
    line = refused(command_here("variants", cwd=tmp_path, MLFLOW_TRACKING_URI="postgresql://ada:hun/ter2@db/mlflow"), 6)
    assert "MLFLOW_TRACKING_URI is not an address (postgresql://***@db/mlflow); write the /" in line
    assert "ter2" not in line


def test_what_keys_change_and_that_nothing_arrived_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_KEYS", str(tmp_path / "keys"))
    told = CliRunner().invoke(app, ["keys", "init"]).output
    assert str(tmp_path / "keys" / "public.pem") in told and "what was registered before is not signed" in told
    cli._tell_arrivals([], as_json=False)
    assert capsys.readouterr().out == "no checkpoint has arrived\n"


@pytest.mark.slow
def test_looking_back_at_nothing_is_refused(tmp_path: Path) -> None:
    assert "run `featherweight optimize" in refused(call("variants", cwd=tmp_path), 8)
    assert "no registered model 'ghost'" in refused(command_here("lineage", "models:/ghost@champion", cwd=tmp_path), 8)
    assert "no registered model 'ghost'" in refused(command_here("promote", "ghost/1", cwd=tmp_path), 8)
    assert "no registered model 'ghost'" in refused(command_here("rollback", "ghost", cwd=tmp_path), 8)
    for look in (["audit", "--all"], ["gc"], ["impact", "--library", "torch"], ["guard", "--port", "0"]):
        assert "nothing was optimized yet" in refused(command_here(*look, cwd=tmp_path), 8)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".featherweight").mkdir()
    (tmp_path / ".featherweight" / "mlflow.db").write_bytes(empty_store())
    assert "no registered model 'ghost'" in refused(command_here("lineage", "ghost", cwd=tmp_path), 8)
    assert "no registered model 'ghost'" in refused(command_here("promote", "ghost/1", cwd=tmp_path), 8)
    assert "unknown stage 'moon'" in refused(command_here("promote", "ghost/1", "--to", "moon", cwd=tmp_path), 2)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "lines"), [((), ["reading absent.yaml"]), (("--json",), [])])
def test_a_terminal_is_told_at_once_what_is_being_done(tmp_path: Path, flags: tuple[str, ...], lines: list[str]) -> None:
    ours, theirs = pty.openpty()
    command = [str(Path(sys.executable).with_name("featherweight")), "plan", "absent.yaml", *flags]
    assert subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=theirs, timeout=600).returncode == 2
    told = os.read(ours, 10_000).decode().splitlines()
    assert told[:-1] == lines and told[-1].startswith("featherweight: cannot read recipe absent.yaml")
    os.close(ours)
    os.close(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("plan", "absent.yaml"), ("plan", "--nonsense", "x"), ("watch", "--every", "0")])
def test_json_is_json_where_it_fails_too(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = call(*arguments, "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert told["exit_code"] == done.returncode == 2
    assert told["error"]


@pytest.mark.slow
def test_debug_shows_the_trace(tmp_path: Path) -> None:
    done = call("--debug", "plan", "absent.yaml", cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "Traceback" not in call("plan", "absent.yaml", cwd=tmp_path).stderr


@pytest.mark.slow
def test_version_and_every_help(tmp_path: Path) -> None:
    assert command_here("--version", cwd=tmp_path).stdout.strip() == "0.1.0"
    known = ("optimize", "plan", "variants", "lineage", "promote", "approve", "rollback", "watch", "doctor", "ui")
    for command in (*known, "history", "audit", "compare", "impact", "reproduce", "serve"):
        assert "Usage" in command_here(command, "--help", cwd=tmp_path).stdout
