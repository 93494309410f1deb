"""Windows of text in the tokens of a trimmed tokenizer, so that what is measured stands for the same text, byte for byte.

A token that is still there keeps its place; one that has gone is spelt in what the tokenizer makes of it by itself. A window that
has become too long for the model is scored in several, each of which begins and ends as the first does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import VOCABULARIES, Listing, is_companion
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import StageError
from featherweight.model.architecture import Family
from featherweight.text.examples import Example
from featherweight.text.tokens import Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTINUING = "##"
"""WordPiece's mark of a word that goes on."""


@dataclass(frozen=True)
class Respelling:
    """What the ids of one tokenizer are in another, which has some of its pieces."""

    source: PreTrainedTokenizerBase
    target: PreTrainedTokenizerBase
    _known: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def between(cls, source: Path, target: Path) -> Respelling | None:
        """From the tokenizer in one folder to that in another; None where they are the same, or there is no other."""
        theirs_at = _files(target)
        if not theirs_at or theirs_at == _files(source):
            return None
        ours, theirs = load_tokenizer(source), load_tokenizer(target)
        return None if ours.get_vocab() == theirs.get_vocab() else cls(ours, theirs)

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return self.target.get_vocab()

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.target.all_special_ids)

    def tokens(self, one: int) -> list[int]:
        """The ids that stand for the source's id `one`. Raises StageError where nothing does."""
        if one not in self._known:
            piece: Any = self.source.convert_ids_to_tokens(one)
            kept = self._vocabulary.get(piece)
            self._known[one] = self._spelt(piece) if kept is None else [kept]
        return self._known[one]

    def _spelt(self, piece: str) -> list[int]:
        tokenizer: Any = self.target
        if not tokenizer.is_fast:
            raise StageError(
                f"the variant's tokenizer has no {piece!r}, and a {type(tokenizer).__name__} does not tell how to spell it"
            )
        if piece.startswith(CONTINUING) and type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece":
            return self._continued(piece.removeprefix(CONTINUING))
        found = [token.id for token in tokenizer.backend_tokenizer.model.tokenize(piece)]
        return found or self._unknown

    @property
    def _unknown(self) -> list[int]:
        return [int(self.target.unk_token_id)]

    def _continued(self, rest: str) -> list[int]:
        """The longest pieces from the left, each the middle of a word."""
        found = []
        while rest:
            ends = (end for end in range(len(rest), 0, -1) if CONTINUING + rest[:end] in self._vocabulary)
            end = next(ends, 0)
            if not end:
                return self._unknown
            found.append(self._vocabulary[CONTINUING + rest[:end]])
            rest = rest[end:]
        return found

    def all(self, ids: Sequence[int]) -> list[int]:
        """Several tokens, one behind the other."""
        return list(chain.from_iterable(map(self.tokens, ids)))

    def firsts(self, ids: Sequence[int]) -> list[int]:
        """Where each token begins, once it is spelt anew."""
        return [0, *accumulate(len(self.tokens(one)) for one in ids)][: len(ids)]

    def windows(self, window: Window, family: Family, limit: int) -> list[Window]:
        """The window in windows of up to `limit` tokens, the first of which counts for all of its bytes."""
        if isinstance(window, Example):
            return [self._example(window, limit)]
        parts = list(self._masked(window, limit) if family == "encoder" else self._following(window, limit))
        return [replace(parts[0], text_bytes=window.text_bytes), *parts[1:]]

    def _example(self, example: Example, limit: int) -> Example:
        """Cut to `limit` as the tokenizer cuts a text, its end kept."""
        ids, types = self.all(example.ids), [one for one, spelt in self._spread(example.ids, example.types) for _ in spelt]
        return replace(example, ids=_cut(ids, limit), types=_cut(types, limit))

    def _spread(self, ids: Sequence[int], beside: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        return ((one, self.tokens(token)) for token, one in zip(ids, beside, strict=True))

    def _following(self, window: Window, limit: int) -> Iterator[Window]:
        """Where `ids` are too long, later parts begin with what the first begins with: a token of the frame, or the one before."""
        ids, source = self.all(window.ids), _cut(self.all(window.source), limit)
        lead = ids[:1] if ids[0] in self._special else []
        first, step = ids[:limit], limit - 1
        yield Window(first, 0, source)
        for start in range(limit, len(ids), step):
            yield Window([*(lead or ids[start - 1 : start]), *ids[start : start + step]], 0, source)

    def _masked(self, window: Window, limit: int) -> Iterator[Window]:
        """A masked token is as many as it is spelt in. What has no masked token is not scored."""
        mask, ids, source = self.target.mask_token_id, list[int](), list[int]()
        for read, spelt in self._spread(window.ids, window.source):
            ids += spelt
            source += spelt if self.tokens(read) == spelt else [mask] * len(spelt)
        framed = [one in self._special and one == there for one, there in zip(ids, source, strict=True)]
        lead, end = len(list(takewhile(bool, framed))), len(ids) - len(list(takewhile(bool, reversed(framed))))
        step = limit - lead - (len(ids) - end)
        for start in range(lead, end, step):
            whole, seen = ([*row[:lead], *row[start : min(end, start + step)], *row[end:]] for row in (ids, source))
            if whole != seen:
                yield Window(whole, 0, seen)


def _cut(ids: list[int], limit: int) -> list[int]:
    """The first `limit` ids, the last of all at their end."""
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def _files(folder: Path) -> dict[str, bytes]:
    """What holds the pieces of a folder's tokenizer."""
    return {name: (folder / name).read_bytes() for name in Listing.of(folder).sizes if is_companion(name, VOCABULARIES)}
