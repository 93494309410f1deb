"""What the documents' labels are to a checkpoint: numbers of its own labels, in the shape of its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featherweight.errors import DataError
from featherweight.measure.agreement import IGNORED
from featherweight.model.architecture import task_of
from featherweight.model.heads import by_label
from featherweight.spec import HEADED
from featherweight.text.documents import Document, Label, read_documents


def require_labels(config: Any, text: Path) -> None:
    """Raise DataError where a classifier would be trained on what it says itself."""
    if task_of(config) not in HEADED[1:]:
        return
    first = next(read_documents(text), None)
    if first is not None and first.label is None:
        raise DataError(
            f"the text ({first.id} ...) has no labels to train on; set data.label, or leave finetune out: a distillation learns "
            "from the checkpoint's own answers"
        )


def label_ids(config: Any, tokenizer: Any, document: Document, told: Any) -> list[int]:
    """The document's label as the numbers of an Example. Raises DataError for one that the checkpoint does not have."""
    label = document.label
    assert label is not None
    if task_of(config) == "token-classification":
        return _word_labels(config, tokenizer, document, told)
    if by_label(config):
        return _standing(config, document, label)
    if isinstance(label, list):
        raise DataError(f"{document.id} has several labels, and the checkpoint gives a text one; set data.label")
    return [_number(config, document, label)]


def _standing(config: Any, document: Document, label: Label) -> list[int]:
    """0 or 1 for each label. A single one is said by itself: 1 where the two texts belong together."""
    if config.num_labels == 1 and label in (0, 1, "0", "1"):
        return [int(str(label))]
    held = {_number(config, document, one) for one in (label if isinstance(label, list) else [label])}
    return [int(place in held) for place in range(config.num_labels)]


def _number(config: Any, document: Document, label: str | int) -> int:
    names = {str(name): int(place) for place, name in config.id2label.items()}
    known = {**{str(place): place for place in names.values()}, **names}
    if str(label) not in known:
        shown = ", ".join(list(names)[:8])
        raise DataError(
            f"{document.id} has the label '{label}', which the checkpoint does not know (known: {shown}); set data.label"
        )
    return known[str(label)]


def _word_labels(config: Any, tokenizer: Any, document: Document, told: Any) -> list[int]:
    """Each word's label at its first token."""
    given = document.label
    labels = given if isinstance(given, list) else str(given).split()
    words = document.text.split()
    if len(labels) != len(words):
        raise DataError(f"{document.id} has {len(words)} words and {len(labels)} labels; give one for each word")
    starts = {}
    place = 0
    for word, label in zip(words, labels, strict=True):
        place = document.text.index(word, place)
        starts[place] = _number(config, document, label)
        place += len(word)
    return [starts.get(first, IGNORED) if end > first else IGNORED for first, end in _offsets(tokenizer, document.text, told)]


def _offsets(tokenizer: Any, text: str, told: Any) -> list[tuple[int, int]]:
    """The characters that each token stands for, spaces before a word left out."""
    found = tokenizer(text, verbose=False, return_offsets_mapping=True)["offset_mapping"][: len(told["input_ids"])]
    return [(first + len(text[first:end]) - len(text[first:end].lstrip()), end) for first, end in found]
