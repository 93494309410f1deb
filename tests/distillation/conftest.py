"""Stories, and a teacher of each family."""

from __future__ import annotations

from pathlib import Path

import pytest

from featherweight.text.documents import Document, write_documents
from tests.support.families import FAMILIES, family_checkpoint


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Little stories of words that the tiny tokenizers know."""
    folder = tmp_path_factory.mktemp("text")
    animals, verbs, places = ("fox", "bear", "wolf", "hare"), ("ran", "sang", "ate", "slept"), ("river", "hill", "house")
    lines = [
        f"once upon a time there was a little {a} and the {a} {v} by the {p} day and night ."
        for a in animals
        for v in verbs
        for p in places
    ]
    write_documents(folder, [Document(str(n), " ".join(lines[n : n + 3])) for n in range(len(lines) - 2)])
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    layers = {
        "llama": {"num_hidden_layers": 3},
        "t5": {"num_layers": 3, "num_decoder_layers": 3},
        "bert": {"num_hidden_layers": 3},
        "m2m_100": {"encoder_layerdrop": 1.0, "decoder_layerdrop": 1.0},
    }
    return {name: family_checkpoint(name, folder / name, **layers.get(name, {})) for name in (*FAMILIES, "m2m_100")}
