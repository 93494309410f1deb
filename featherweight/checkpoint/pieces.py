"""The pieces of a tokenizer: which must stay beside those that are wanted, and the tokenizer of those alone.

What has to hold of the smaller one: a text of wanted pieces is cut as before, any other into smaller pieces or bytes, and nothing
is unknown that was not.

- BPE: a piece is cut in any word as it is by itself, so that the merges that make it of its characters have to stay, and what
  stands between them. A subset of the merges that has all those of a text takes the same one at each step.
- Unigram: the best path of a text is still there, and so still the best. An unknown character costs a little more than the
  rarest piece, so that this piece stays.
- WordPiece: from the left, the longest piece that is there; behind the text's own pieces no longer one has come to be.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from featherweight.errors import StageError

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
KINDS = ("BPE", "Unigram", "WordPiece")
"""The models of tokenizers that can do without some of their pieces."""
ENDS = ("sep", "cls")
"""Where BERT's and RoBERTa's post-processors keep the tokens that they add."""


@dataclass(frozen=True)
class Pieces:
    """A tokenizer as its tokenizer.json describes it."""

    told: Mapping[str, Any]

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Pieces:
        """Raises StageError for a tokenizer whose pieces have to stay all together."""
        model = told["model"]
        if model.get("type") not in KINDS:
            raise StageError(
                f"a tokenizer of kind {model.get('type')} cannot do without some of its tokens; known: {', '.join(KINDS)}"
            )
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model["type"] == "BPE" and model.get(key):
                raise StageError(f"a BPE tokenizer with {key} ({model[key]!r}) is not trimmed here; leave the stage out")
        return cls(told)

    @property
    def model(self) -> Mapping[str, Any]:
        """The part that cuts words into pieces."""
        return self.told["model"]

    @property
    def kind(self) -> str:
        """BPE, Unigram or WordPiece."""
        return str(self.model["type"])

    @cached_property
    def spelt(self) -> dict[int, str]:
        """The model's own pieces by id."""
        vocabulary = self.model["vocab"]
        if self.kind == "Unigram":
            return {place: piece for place, (piece, _) in enumerate(vocabulary)}
        return {place: piece for piece, place in vocabulary.items()}

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids of the model's own pieces."""
        return {piece: place for place, piece in self.spelt.items()}

    @cached_property
    def added(self) -> dict[int, str]:
        """Special tokens, and what was added to the model's pieces, by id."""
        return {token["id"]: token["content"] for token in self.told.get("added_tokens") or ()}

    @property
    def falls_back_to_bytes(self) -> bool:
        """Whether a character without a piece is spelt in bytes, all of which are there."""
        return bool(self.model.get("byte_fallback")) and sum(bool(BYTE.fullmatch(piece)) for piece in self.ids) == 256

    @property
    def byte_level(self) -> bool:
        """Whether each byte of a text is a letter of the pieces, as in GPT-2."""
        return '"ByteLevel"' in str(self.told.get("pre_tokenizer")).replace("'", '"')

    def letters(self, piece: str) -> str:
        """A piece without the mark of a word that goes on."""
        return piece.removeprefix(self.model.get("continuing_subword_prefix") or "") if self.kind == "WordPiece" else piece

    def closed(self, wanted: Iterable[int], *, characters: bool = True) -> list[int]:
        """The ids that stay for the `wanted` ones, rising: these, special and added tokens, bytes, and what the kind needs.

        characters: every character that has a piece keeps it. Raises StageError where they may not go.
        """
        if not (characters or self.falls_back_to_bytes):
            raise StageError("without bytes to fall back to, a character without its piece is unknown; say keep.characters: all")
        kept = {*wanted, *self.added, *self._framing} | {place for place, piece in self.spelt.items() if BYTE.fullmatch(piece)}
        kept |= {place for place, piece in self.spelt.items() if piece == self.model.get("unk_token")}
        if characters:
            kept |= {place for place, piece in self.spelt.items() if len(self.letters(piece)) == 1}
        return sorted(kept | {"BPE": self._merged, "Unigram": self._costed, "WordPiece": self._spelling}[self.kind](kept))

    @property
    def _framing(self) -> Iterator[int]:
        """The tokens that stand round every text."""
        for processor in _processors(self.told.get("post_processor")):
            yield from (one for token in (processor.get("special_tokens") or {}).values() for one in token["ids"])
            yield from (processor[end][1] for end in ENDS if end in processor)

    def _merged(self, kept: set[int]) -> set[int]:
        """What the merges of these pieces pass through."""
        needed: set[str] = set()
        waiting = [self.spelt[place] for place in kept if place in self.spelt]
        while waiting:
            piece = waiting.pop()
            if piece not in needed:
                needed.add(piece)
                waiting += self._parts(piece)
        return {self.ids[piece] for piece in needed if piece in self.ids}

    def _parts(self, piece: str) -> list[str]:
        """What a piece is made of: as merges make it, or where they do not, all that any merge would make it of."""
        steps = list(merging(piece, self.ranks))
        if len(piece) == 1 or not steps or steps[-1] != (piece,):
            return [part for left, right in self._making.get(piece, ()) for part in (left, right)]
        return [part for step in steps for part in step]

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        """The merges, and which of them comes first."""
        return {pair: rank for rank, pair in enumerate(_pairs(self.model["merges"]))}

    @cached_property
    def _making(self) -> dict[str, list[tuple[str, str]]]:
        making: dict[str, list[tuple[str, str]]] = {}
        for pair in self.ranks:
            making.setdefault("".join(pair), []).append(pair)
        return making

    def _costed(self, kept: set[int]) -> set[int]:
        """The piece whose score says what an unknown character costs, and what cannot be spelt without itself."""
        scores = [score for _, score in self.model["vocab"]]
        rarest = {scores.index(min(scores)), self.model["unk_id"]} - {None}
        return rarest if self.falls_back_to_bytes else rarest | self._spelling(kept)

    def _spelling(self, _: set[int]) -> set[int]:
        """Pieces with a character that has no piece of its own, or that stands in one with such a character."""
        plain = {place: self.letters(piece) for place, piece in self.spelt.items() if place not in self.added}
        bound = {character for letters in plain.values() for character in letters if not self._alone(character)}
        found: set[int] = set()
        while more := {place for place, letters in plain.items() if place not in found and not bound.isdisjoint(letters)}:
            found |= more
            bound |= {character for place in more for character in plain[place]}
        return found

    def _alone(self, character: str) -> bool:
        prefix = self.model.get("continuing_subword_prefix") or ""
        return character in self.ids and (self.kind != "WordPiece" or f"{prefix}{character}" in self.ids)

    def without(self, kept: list[int]) -> dict[str, Any]:
        """The tokenizer.json with the ids of `kept` alone (rising), each at its place in it."""
        told: Any = copy.deepcopy({key: value for key, value in self.told.items() if key != "model"})
        places = {old: new for new, old in enumerate(kept)}
        told["model"] = {**self.model, **self._model(places)}
        for token in told.get("added_tokens") or ():
            token["id"] = places[token["id"]]
        if told.get("padding"):
            told["padding"]["pad_id"] = places[told["padding"]["pad_id"]]
        for processor in _processors(told.get("post_processor")):
            _replace(processor, places)
        return {key: told[key] for key in self.told}

    def _model(self, places: Mapping[int, int]) -> dict[str, Any]:
        if self.kind == "Unigram":
            entries, unknown = self.model["vocab"], self.model["unk_id"]
            scored = [entry for place, entry in enumerate(entries) if place in places]
            return {"vocab": scored, "unk_id": None if unknown is None else places[unknown]}
        vocabulary = {piece: places[place] for piece, place in self.model["vocab"].items() if place in places}
        if self.kind == "WordPiece":
            return {"vocab": vocabulary}
        merges = [pair for pair in self.ranks if all(part in vocabulary for part in (*pair, "".join(pair)))]
        return {"vocab": vocabulary, "merges": [list(pair) for pair in merges]}


def merging(word: str, ranks: Mapping[tuple[str, str], int]) -> Iterator[tuple[str, ...]]:
    """The parts of a word after each merge: every time the pair of the lowest rank, the leftmost of its like."""
    parts = list(word)
    while True:
        known = [(ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not known:
            return
        place = min(known)[1]
        parts[place : place + 2] = ["".join(parts[place : place + 2])]
        yield tuple(parts)


def _pairs(merges: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Merges as pairs; older files write the two parts as a line."""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _processors(told: Any) -> Iterator[dict[str, Any]]:
    """A post-processor, or those of a sequence."""
    if told:
        yield from (inner for one in told["processors"] for inner in _processors(one)) if "processors" in told else (told,)


def _replace(processor: dict[str, Any], places: Mapping[int, int]) -> None:
    """Give the tokens that a post-processor adds their new ids, in place."""
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [places[one] for one in token["ids"]]
    for end in ENDS:
        if end in processor:
            processor[end] = [processor[end][0], places[processor[end][1]]]
