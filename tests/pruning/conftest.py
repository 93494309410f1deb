"""Text of the words that the tiny tokenizers know."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from featherweight.text.documents import Document, write_documents
from tests.support.families import WORDS


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    write_documents(folder, [Document(f"{n}", " ".join(draw.choices(WORDS.split(), k=80))) for n in range(12)])
    return folder
