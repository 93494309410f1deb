"""Token windows: what training, calibration and evaluation read of a folder of documents.

What the tokenizer does is what is done: `tokenizer(text)` says whether a text begins with BOS and ends with EOS. A window is a
sequence of its own, so it begins as the tokenizer begins every sequence, inside a document too. A tokenizer that puts nothing in
front leaves a window's first token without anything to be predicted from: it is read, not scored, and is the last one that the
window before has scored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from featherweight.checkpoint.tokenizer import framed
from featherweight.errors import DataError
from featherweight.text.documents import shuffled_documents

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

BATCH = 64
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Window:
    """What a model is scored on; `text_bytes` is what the scored tokens stand for in the original text, in UTF-8.

    Causal: `ids` begin as the tokenizer begins a text, and ids[1:] are scored. Seq2seq: `ids` begin with the
    decoder's start token, and ids[1:] are scored given `source`. Encoder: `source` is `ids` with some tokens masked, and those
    are scored.
    """

    ids: list[int]
    text_bytes: int
    source: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Frame:
    """What the tokenizer puts before and behind every text."""

    lead: list[int]
    tail: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """Those of a tokenizer."""
        return cls(*framed(tokenizer))


@dataclass(frozen=True)
class Encoded:
    """A text's tokens. `offsets`: the characters of the text that each stands for, None where the tokenizer does not tell."""

    text: str
    ids: list[int]
    pieces: list[str]
    offsets: list[tuple[int, int]] | None

    @cached_property
    def sizes(self) -> list[int]:
        """UTF-8 bytes of the text that each token stands for; their sum is the text's.

        White space that no token stands for counts with the token behind it. Where tokens are parts of one character, each
        counts the bytes that it spells, or where it spells none the last one counts the character.
        """
        return _shared_out(self.text, self.pieces) if self.offsets is None else _sizes(self.text, self.pieces, self.offsets)


def _sizes(text: str, pieces: list[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    sizes, reached = [0] * len(offsets), 0
    for first, after, end in _runs(offsets):
        size = _bytes(text[reached:end])
        sizes[after - 1] = size
        for spelt in (_letters, _spelt_bytes) if after - first > 1 else ():
            lengths = [spelt(piece) for piece in pieces[first:after]]
            if sum(lengths) == size:
                sizes[first:after] = lengths
                break
        reached = max(reached, end)
    real = [place for place, (start, end) in enumerate(offsets) if end > start]
    if real:
        sizes[real[-1]] += _bytes(text[reached:])
    return sizes


def _runs(offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(first token, the one after the last, the last character's end) of each run of tokens that share characters."""
    first, reached = 0, 0
    for place, (start, end) in enumerate(offsets):
        if place > first and start >= reached:
            yield first, place, reached
            first = place
        reached = max(reached, end)
    if offsets:
        yield first, len(offsets), reached


def _letters(piece: str) -> int:
    """The bytes of a byte-level piece, which spells each as one letter."""
    return len(piece)


def _spelt_bytes(piece: str) -> int:
    """The bytes of a SentencePiece piece, `<0xE6>` or characters; the mark of a space stands outside of what is shared."""
    return 1 if _BYTE.fullmatch(piece) else _bytes(piece.replace("▁", ""))


def _shared_out(text: str, pieces: list[str]) -> list[int]:
    """Without offsets the text's bytes are shared out by the length of the pieces, to the byte over the whole text."""
    lengths = [max(1, _spelt_bytes(piece)) for piece in pieces]
    whole, size = sum(lengths), _bytes(text)
    ends = [0, *(size * reached // whole for reached in accumulate(lengths))]
    return [end - start for start, end in pairwise(ends)]


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> Encoded:
    """A text's tokens and where they stand in it; `options` go to the tokenizer."""
    (only,) = encode_batch(tokenizer, [text], **options)
    return only


def encode_target(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """The tokens of a text that a seq2seq model is to write, framed as its tokenizer frames targets."""
    fast = bool(tokenizer.is_fast)
    found: Any = tokenizer(text_target=[text], verbose=False, **({"return_offsets_mapping": True} if fast else {}))
    return _encoded(tokenizer, text, found, 0)


def encode_batch(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> list[Encoded]:
    """The same for several texts, in parallel."""
    offsets = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
    found: Any = tokenizer(texts, verbose=False, **offsets, **options)
    return [_encoded(tokenizer, text, found, place) for place, text in enumerate(texts)]


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, found: Any, place: int) -> Encoded:
    ids = list(found["input_ids"][place])
    pieces = tokenizer.convert_ids_to_tokens(ids)
    offsets = found["offset_mapping"][place] if "offset_mapping" in found else None
    return Encoded(text, ids, list(pieces), offsets)


def token_blocks(
    text: Path, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None, seed: int | None = None
) -> Tensor:
    """Documents packed end to end, each framed as the tokenizer does it: int64 [blocks, length]. Raises DataError for too few.

    With a `seed` the documents come in a random order, so that a `limit` takes a sample and not the beginning.
    """
    import torch

    wanted = None if limit is None else limit * length
    stream: list[int] = []
    for batch in _batches(text, seed):
        for ids in tokenizer(batch, verbose=False)["input_ids"]:
            stream += ids
        if wanted is not None and len(stream) >= wanted:
            break
    blocks = len(stream) // length
    if blocks == 0:
        raise DataError(f"the text holds {len(stream)} tokens, fewer than one block of {length}; give more text")
    return torch.tensor(stream[: blocks * length], dtype=torch.long).view(blocks, length)[:limit]


def token_windows(text: Path, tokenizer: PreTrainedTokenizerBase, length: int, limit: int, shortest: int = 16) -> list[Window]:
    """Up to `limit` windows of at most `length` tokens, taken from as many documents as there are; see the module.

    Rounds over the documents: the first window of each, then the second of each. Windows under `shortest` tokens are left out.
    """
    frame = Frame.of(tokenizer)
    body, least = length - len(frame.lead), max(2, shortest) - len(frame.lead)
    documents = _documents(text, tokenizer, limit, least - len(frame.tail))
    lengths = [len(document.ids) + len(frame.tail) for document in documents]
    windows = []
    for place, start, end in islice(_rounds(lengths, body, body if frame.lead else body - 1, least), limit):
        document, scored = documents[place], start if frame.lead else start + 1
        ids = [*document.ids, *frame.tail][start:end]
        windows.append(Window(frame.lead + ids, sum(document.sizes[scored:end])))
    return windows or _refuse(shortest)


def framed_pieces(
    text: Path, tokenizer: PreTrainedTokenizerBase, length: int, limit: int, shortest: int
) -> list[tuple[list[int], list[int]]]:
    """(token ids, the text's bytes in each) of up to `limit` pieces of documents, in rounds, each framed as a text of its own.

    length: of a piece and its frame. shortest: of a piece alone.
    """
    frame = Frame.of(tokenizer)
    body = length - len(frame.lead) - len(frame.tail)
    documents, pieces = _documents(text, tokenizer, limit, shortest), []
    for place, start, end in islice(_rounds([len(one.ids) for one in documents], body, body, shortest), limit):
        ids, sizes = documents[place].ids[start:end], documents[place].sizes[start:end]
        pieces.append(([*frame.lead, *ids, *frame.tail], [*(0 for _ in frame.lead), *sizes, *(0 for _ in frame.tail)]))
    return pieces or _refuse(shortest)


def _refuse(shortest: int) -> NoReturn:
    raise DataError(f"the text holds no document of {shortest} tokens; give more or longer text")


def _documents(text: Path, tokenizer: PreTrainedTokenizerBase, limit: int, shortest: int) -> list[Encoded]:
    """Documents of `shortest` tokens at least, without a frame; no more than `limit` of them are ever needed."""
    every = chain.from_iterable(encode_batch(tokenizer, batch, add_special_tokens=False) for batch in _batches(text))
    return list(islice((document for document in every if len(document.ids) >= shortest), limit))


def _rounds(lengths: list[int], body: int, step: int, shortest: int) -> Iterator[tuple[int, int, int]]:
    """(document, first token, the one after the last) of pieces of up to `body` tokens: the first of each, then the second."""
    for start in range(0, max(lengths, default=0), max(1, step)):
        for place, length in enumerate(lengths):
            if min(body, length - start) >= max(1, shortest):
                yield place, start, min(start + body, length)


def _batches(text: Path, seed: int | None = None) -> Iterator[list[str]]:
    """Texts of the documents, some at a time: tokenizers work on them in parallel."""
    texts = (document.text for document in shuffled_documents(text, seed))
    while batch := list(islice(texts, BATCH)):
        yield batch
