"""The GitHub Action: as GitHub's own schemas want it, and its commands run for real; `gh` alone is played, by a program that keeps
what it is asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT

GITHUB = ROOT / "infra" / "github"
ACTION = yaml.safe_load((GITHUB / "action.yaml").read_text())
BIN = Path(sys.executable).parent


@pytest.mark.slow
@pytest.mark.parametrize(("schema", "file"), [("github-actions", "action.yaml"), ("github-workflows", "workflow.yaml")])
def test_github_reads_it(schema: str, file: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(GITHUB / file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_name_that_it_uses_is_there() -> None:
    """Inputs, steps and outputs by their expressions, and the programs that it runs."""
    text = (GITHUB / "action.yaml").read_text()
    steps = {step["id"] for step in ACTION["runs"]["steps"] if "id" in step}
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == ACTION["inputs"].keys()
    assert set(re.findall(r"steps\.(\w+)\.", text)) <= steps
    told = set(re.findall(r'"?([\w-]+)=\$', (GITHUB / "optimize").read_text().partition("GITHUB_STEP_SUMMARY")[2]))
    assert set(re.findall(r"steps\.optimize\.outputs\.([\w-]+)", text)) <= told
    for path in re.findall(r"\$GITHUB_ACTION_PATH/([\w./-]+)", text):
        assert path.startswith("../../.venv") or (GITHUB / path).exists()
    used = yaml.safe_load((GITHUB / "workflow.yaml").read_text())["jobs"]["optimize"]["steps"][-1]
    assert used["uses"].partition("@")[0].endswith("/infra/github") and used["with"].keys() <= ACTION["inputs"].keys()


def test_nothing_that_others_write_is_read_as_a_command() -> None:
    """Expressions go through the environment: a branch or a recipe may be called `$(rm -rf .)`."""
    assert not [step["run"] for step in ACTION["runs"]["steps"] if "${{" in step.get("run", "")]


def run(program: str, folder: Path, **told: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str], str]:
    """What a program of the action did, the outputs that it told, and the job's summary."""
    places = {"RUNNER_TEMP": str(folder), "GITHUB_OUTPUT": str(folder / "outputs"), "GITHUB_STEP_SUMMARY": str(folder / "summary")}
    for name in ("outputs", "summary"):
        (folder / name).write_text("")
    environment = {**os.environ, "PATH": f"{folder}:{BIN}:{os.environ['PATH']}", **places, **told}
    done = subprocess.run([GITHUB / program], cwd=folder, env=environment, capture_output=True, text=True)
    outputs = dict(line.split("=", 1) for line in (folder / "outputs").read_text().splitlines())
    return done, outputs, (folder / "summary").read_text()


@pytest.mark.slow
def test_a_recipe_that_is_refused_is_told_and_fails_last(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\ncheckpoints: {}\n")
    done, outputs, summary = run("optimize", tmp_path, RECIPE="recipe.yaml", ARGUMENTS="--workspace w")
    assert done.returncode == 0
    assert (outputs["exit-code"], outputs["winner"]) == ("2", "none")
    assert "report" not in outputs
    assert "### Featherweight: recipe.yaml" in summary and "recipe.yaml: checkpoint: Field required" in summary
    assert summary == Path(outputs["table"]).read_text()


GH = """#!/bin/bash
printf '%s\\n' "$*" >>"{log}"
case "$*" in
    *comments*PATCH* | *PATCH*comments*) exit 0 ;;
    *pulls*) echo "{pull}" ;;
    *paginate*) echo "{said}" ;;
    *POST*) exit {refused} ;;
esac
"""


@pytest.mark.parametrize(
    ("event", "pull", "said", "asked"),
    [
        ("7", "", "", "--method POST repos/o/r/issues/7/comments"),
        ("", "9", "", "--method POST repos/o/r/issues/9/comments"),
        ("7", "", "1234", "--method PATCH repos/o/r/issues/comments/1234"),
        ("", "", "", ""),
    ],
    ids=["a pull request", "a push to its branch", "a second run", "a push without one"],
)
def test_the_table_is_commented_once(tmp_path: Path, event: str, pull: str, said: str, asked: str) -> None:
    log, table = tmp_path / "log", tmp_path / "table.md"
    (tmp_path / "gh").write_text(GH.format(log=log, pull=pull, said=said, refused=0))
    (tmp_path / "gh").chmod(0o755)
    table.write_text("| variant |\n|---|\n| `$(touch ran)` |\n")
    told = {"PULL": event, "TABLE": str(table), "RECIPE": "recipe.yaml", "GITHUB_REPOSITORY": "o/r", "GITHUB_SHA": "abc"}
    done, _, _ = run("comment", tmp_path, **told)
    assert done.returncode == 0, done.stderr
    wrote = [line for line in log.read_text().splitlines() if "--method" in line]
    assert [asked in line for line in wrote] == ([True] if asked else [])
    assert ("<!-- featherweight recipe.yaml -->" in log.read_text()) == bool(asked)
    assert not (tmp_path / "ran").exists()


def test_who_may_not_comment_is_warned_and_the_job_goes_on(tmp_path: Path) -> None:
    (tmp_path / "gh").write_text(GH.format(log=tmp_path / "log", pull="", said="", refused=1))
    (tmp_path / "gh").chmod(0o755)
    (tmp_path / "table.md").write_text("| variant |\n")
    told = {"PULL": "7", "TABLE": str(tmp_path / "table.md"), "RECIPE": "r", "GITHUB_REPOSITORY": "o/r", "GITHUB_SHA": "abc"}
    done, _, _ = run("comment", tmp_path, **told)
    assert done.returncode == 0
    assert done.stdout.startswith("::warning::")
