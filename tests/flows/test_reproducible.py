"""Same recipe, same machine, same digest: every stage that writes weights, run in two processes that hash in different orders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.text.documents import Document, write_documents
from tests.support.every_stage import digests
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    stories = [f"Number {number} of the stories: a fox, a wolf and a bear met at the river by night." for number in range(80)]
    write_documents(folder, [Document(str(place), story) for place, story in enumerate(stories)])
    return folder


def digests_elsewhere(text: Path, root: Path) -> dict[str, str]:
    """The same stages in another process, which hashes in another order."""
    environment = os.environ | {"PYTHONHASHSEED": "2", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.support.every_stage", str(text), str(root)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.engine
@pytest.mark.slow
def test_every_stage_gives_the_same_digest_again(text: Path, tmp_path: Path) -> None:
    first, second = digests(text, tmp_path / "here"), digests_elsewhere(text, tmp_path / "there")
    assert first == second
    assert len(set(first.values())) == len(first) == 16
