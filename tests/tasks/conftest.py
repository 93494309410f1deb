"""What `compile` and `export` are tried on: a text, and a checkpoint of each family that engines serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import STORY, _tokenizer
from tests.support import serving_models as models


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_text(tmp_path_factory.mktemp("text"), STORY)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Checkpoints by family. Served folders share inodes with them, so at the end not a byte of theirs may have changed."""
    root = tmp_path_factory.mktemp("models")
    folders = {family: models.make(family, root / family, _tokenizer()) for family in models.FAMILIES}
    before = models.digests(root)
    yield folders
    assert models.digests(root) == before
