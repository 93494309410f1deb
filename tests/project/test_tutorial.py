"""The tutorial and the notebooks as a newcomer runs them: every command as it is written, in order, in an empty folder."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.command import check_featherweight
from tests.support.paths import ROOT

WHOLE = pytest.mark.skipif("FEATHERWEIGHT_TUTORIAL" not in os.environ, reason="minutes; FEATHERWEIGHT_TUTORIAL=1 runs it")
STARTS = [pytest.mark.slow, pytest.mark.server, pytest.mark.engine]
TUTORIAL = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "guide" / "tutorial.md").read_text(), re.DOTALL)
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder that has the recipes of a checkout."""
    place = tmp_path_factory.mktemp("newcomer")
    (place / "recipes").symlink_to(ROOT / "recipes")
    return place


def environment() -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "PREFECT_HOME")}
    return known | {"PATH": f"{BIN}:{os.environ['PATH']}", "BROWSER": "true", "PYTHONUNBUFFERED": "1"}


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, shell=True, cwd=folder, env=environment(), capture_output=True, text=True, timeout=3000)
    print(f"$ {command}\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}")
    return done


@contextmanager
def served(command: str, folder: Path, ready: str) -> Iterator[str]:
    """What a command that serves until Ctrl-C has said once a line holds `ready`; it ends well when told to."""
    words = shlex.split(command)
    server = subprocess.Popen(words, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True)
    assert server.stdout
    said = ""
    try:
        while ready not in said and (line := server.stdout.readline()):
            said += line
        assert ready in said, f"{command} ended: {said}"
        yield said
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=300)
    assert server.returncode == 0


@WHOLE
class TestTutorial:
    """In the order of the page; each step goes on from those before."""

    pytestmark = STARTS

    def test_every_step_is_tried_here(self) -> None:
        assert [" ".join(shlex.split(block)[:2]) for block in TUTORIAL] == [
            f"featherweight {name}" for name in ("doctor", "plan", "demo", "variants", "lineage", "ui", "serve")
        ]

    def test_doctor_says_what_is_there(self, folder: Path) -> None:
        done = run(TUTORIAL[0], folder)
        assert done.returncode in (0, 7)
        assert "onnxruntime-genai" in done.stdout

    def test_plan_runs_nothing(self, folder: Path) -> None:
        done = run(TUTORIAL[1], folder)
        assert done.returncode == 0
        assert "evaluate" in done.stdout
        assert not (folder / ".featherweight" / "mlflow.db").exists()

    def test_demo_promotes_a_champion_and_the_second_time_takes_all_from_the_cache(self, folder: Path) -> None:
        first = run(TUTORIAL[2], folder)
        assert first.returncode == 0
        assert "registered as demo version 1, in production" in first.stdout
        second = run(TUTORIAL[2], folder)
        assert second.returncode == 0
        assert "version 1, in production" in second.stdout

    def test_variants_shows_the_table_again_and_the_report_lies_there(self, folder: Path) -> None:
        assert "winner" in run(TUTORIAL[3], folder).stdout
        assert "<html" in (folder / "report.html").read_text()

    def test_lineage_verifies(self, folder: Path) -> None:
        done = run(TUTORIAL[4], folder)
        assert done.returncode == 0
        assert "verified" in done.stdout

    def test_ui_shows_the_model(self, folder: Path) -> None:
        with served(TUTORIAL[5], folder, "Ctrl-C") as said:
            address = re.search(r"http://\S+token=\S+", said)
            assert address
            with httpx.Client(follow_redirects=True, timeout=60) as client:
                assert "demo" in client.get(address.group()).text

    def test_serve_answers(self, folder: Path) -> None:
        with served(TUTORIAL[6], folder, "curl ") as said:
            asked = next(line for line in said.splitlines() if line.startswith("curl "))
            answer = subprocess.run(f"{asked} --silent --fail", shell=True, capture_output=True, text=True, check=True).stdout
            assert json.loads(answer)


def cells(notebook: Path) -> list[dict]:
    tree = json.loads(notebook.read_text())
    assert (tree["nbformat"], tree["nbformat_minor"]) == (4, 5)
    return tree["cells"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_outputs_and_what_it_calls_exists(notebook: Path) -> None:
    """Its Python compiles, each command exists with its flags, its recipe is valid."""
    from featherweight.recipe.plan import expand
    from featherweight.recipe.recipe import Recipe
    from featherweight.recipe.yaml_text import read_yaml

    code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
    assert len({cell["id"] for cell in cells(notebook)}) == len(cells(notebook))
    assert not [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"]]
    commands = 0
    for text in ("".join(cell["source"]) for cell in code):
        if text.startswith("%%writefile"):
            assert expand(Recipe.model_validate(read_yaml(text.partition("\n")[2]))).variants
            continue
        lines = text.splitlines()
        for words in (shlex.split(line[1:]) for line in lines if line.startswith("!")):
            assert words[0] == "featherweight"
            check_featherweight(words[1:])
            commands += 1
        ast.parse("\n".join(line for line in lines if line[:1] not in ("!", "%")))
    assert commands >= 2


@WHOLE
@pytest.mark.slow
@pytest.mark.server
@pytest.mark.engine
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, and no command in one that failed."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient and ipykernel run notebooks")
    nbformat = pytest.importorskip("nbformat")
    opened = nbformat.read(notebook, as_version=4)
    nbformat.validate(opened)
    after = "\nassert globals().get('_exit_code', 0) == 0, f'exit code {_exit_code}'"
    for cell in opened.cells:
        if cell.cell_type == "code" and cell.source.startswith("!"):
            cell.source += after
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    nbclient.NotebookClient(opened, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
    shown = [output for cell in opened.cells for output in cell.get("outputs", ())]
    assert shown
