"""The command line in the test's own process: what it does, without the 12 CPU seconds in which a process imports its libraries.

Whether the command works as a program is for the tests that start one.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.support.paths import ROOT

COMMAND = str(Path(sys.executable).with_name("featherweight"))


def featherweight(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What a process of the command prints in a folder, and how it ends."""
    env = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return subprocess.run([COMMAND, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


def command_here(*arguments: str, cwd: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    """What `featherweight ARGUMENTS` in a folder prints and how it ends, with changes to the environment.

    Whoever optimizes asks for the fixture `named_prefect`: Prefect, once imported, keeps the server that it has.
    """
    from flows import cli

    out, err, code = io.StringIO(), io.StringIO(), 0
    command = ["featherweight", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"} | changed
    cli._printed_json.set(False)
    with pytest.MonkeyPatch.context() as patched, patch.dict(os.environ, environment, clear=True):
        patched.chdir(cwd)
        patched.setattr(sys, "argv", command)
        with redirect_stdout(out), redirect_stderr(err), _results_in(cwd):
            try:
                cli.run()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else bool(end.code)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def _results_in(folder: Path) -> AbstractContextManager[object]:
    """Prefect, once imported, keeps its results' folder too: here that of the workspace, as in a process of the command's own."""
    if "prefect" not in sys.modules:
        return nullcontext()
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    return temporary_settings({PREFECT_LOCAL_STORAGE_PATH: folder / ".featherweight" / "prefect" / "storage"})


def check_featherweight(words: list[str]) -> None:
    """The sub-command, every option given to it and every recipe named exist."""
    from typer.testing import CliRunner

    from flows.cli import app

    command = [words[0]] if words and not words[0].startswith("-") else []
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", result.output))
    assert {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= known
    assert all((ROOT / word).exists() for word in words if word.startswith("recipes/"))


# The one place, what asks the driver and torch about GPUs for the doctor, and where NVIDIA's library is sought.
