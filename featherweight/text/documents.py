"""Folders of documents: text as the stages pass it on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "documents.jsonl"


Label = str | int | list[str | int]


@dataclass(frozen=True)
class Document:
    """One document and the name by which a report can point at it; `target` is what a seq2seq model is to make of the text.

    pair: the text that it is judged together with. label: what a classifier is to say of it, a label by its name or number, all
    that hold, or one for each word.
    """

    id: str
    text: str
    target: str | None = None
    pair: str | None = None
    label: Label | None = None

    @property
    def content(self) -> str:
        """All that tells it from other documents."""
        return self.text if self.pair is None else f"{self.text}\n{self.pair}"

    @property
    def judged(self) -> bool:
        """Whether something else belongs to the whole of its text."""
        return self.target is not None or self.pair is not None or self.label is not None


def write_documents(folder: Path, documents: list[Document]) -> None:
    """Write a text folder: `documents.jsonl`, one {"id", "text"} a line, and what else it has."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("w", encoding="utf-8") as lines:
        for document in documents:
            fields = {name: value for name, value in asdict(document).items() if value is not None}
            lines.write(json.dumps(fields, ensure_ascii=False) + "\n")


def read_documents(folder: Path) -> Iterator[Document]:
    """The documents of a text folder, in order."""
    with (folder / FILE).open(encoding="utf-8") as lines:
        for line in lines:
            yield Document(**json.loads(line))


def shuffled_documents(folder: Path, seed: int | None) -> Iterable[Document]:
    """The documents of a text folder, in a random order where there is a `seed`."""
    if seed is None:
        return read_documents(folder)
    documents = list(read_documents(folder))
    random.Random(seed).shuffle(documents)
    return documents
