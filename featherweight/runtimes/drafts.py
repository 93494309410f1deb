"""A draft beside what it drafts for: one served folder in another, with the same tokenizer."""

from __future__ import annotations

from pathlib import Path

from featherweight.checkpoint.files import link
from featherweight.errors import RecipeError
from featherweight.runtimes.speculation import DRAFT
from featherweight.store.served_folder import Serving
from featherweight.text.respelling import Respelling


def keep_draft(draft: Path, served: Path) -> None:
    """Put the files of `draft`, a served folder, into `served`. Raises RecipeError where their tokens are not the same."""
    if Respelling.between(draft, served):
        raise RecipeError("speculation.draft: it has other tokens than what it is to draft for; name one with the same tokenizer")
    (served / DRAFT).mkdir()
    for path in sorted((draft / Serving.read(draft).weights).glob("*.gguf")):
        link(path, served / DRAFT / path.name)
    Serving.read(draft).write(served / DRAFT)
