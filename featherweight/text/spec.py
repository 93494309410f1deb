"""What a recipe says of text: where it lies, how it is split, what must hold of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from featherweight.spec import Positive, Share, Spec, Split

Format = Literal["text", "json", "csv", "parquet"]


def globbed(pattern: str) -> str:
    """A pattern that `Path.glob` takes; else ValueError, before any folder is looked into."""
    try:
        next(Path(os.devnull).glob(pattern), None)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"'{pattern}' is no pattern of names below the source ({error}); take one such as **/*.txt") from error
    return pattern


class DataSpec(Spec):
    """Text, split by whole documents. `evaluation` and `calibration` are shares held out of `source`, or sources of their own.

    field, target: the key or column of the text, `translation.en` for one in another; `target` is what a seq2seq model is to make
    of it (a translation, a summary).
    pair, label: those of the second of two texts that are judged together, and of what a classifier is to say: a label, several, or
    one for each word of a text that is words between spaces or in a list.
    format: what the files are, where their content is not to tell it: JSON that is to be read as prose, say.
    """

    source: str
    pattern: Annotated[str, AfterValidator(globbed)] = "**/*"
    field: str = "text"
    target: str | None = None
    pair: str | None = None
    label: str | None = None
    separator: str | None = None
    format: Format | None = None
    evaluation: Share | str = 0.05
    calibration: Share | str = 0.05
    max_bytes: Positive | None = None

    @property
    def columns(self) -> dict[str, str]:
        """The keys or columns that are read, by the option that names each."""
        named = {option: getattr(self, option) for option in ("field", "target", "pair", "label")}
        return {option: name for option, name in named.items() if name is not None}


class TextSpec(Spec):
    """One split of the recipe's text."""

    data: DataSpec
    split: Split


class GateSpec(Spec):
    """Bounds of the data gate. A document overlaps another split where that share of its 13-word shingles stands there."""

    max_overlap: Share = 0.5
