"""Token windows: what training, calibration and evaluation read of a folder of documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.errors import DataError
from featherweight.text.documents import shuffled_documents

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Window:
    """What a model is scored on; `text_bytes` is what the scored tokens stand for, in UTF-8.

    Causal: `ids` begin with the tokenizer's BOS, where it has one, and ids[1:] are scored. Seq2seq: `ids` begin with the
    decoder's start token, and ids[1:] are scored given `source`. Encoder: `source` is `ids` with some tokens masked, and those
    are scored.
    """

    ids: list[int]
    text_bytes: int
    source: list[int] = field(default_factory=list)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, from local files only."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def token_blocks(
    text: Path, tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None = None, seed: int | None = None
) -> Tensor:
    """Documents packed end to end, each led by BOS: int64 [blocks, length]. Raises DataError if they do not fill one.

    With a `seed` the documents come in a random order, so that a `limit` takes a sample and not the beginning.
    """
    import torch

    wanted = None if limit is None else limit * length
    stream: list[int] = []
    for ids in _encode(text, tokenizer, seed):
        stream += ids
        if wanted is not None and len(stream) >= wanted:
            break
    blocks = len(stream) // length
    if blocks == 0:
        raise DataError(f"the text holds {len(stream)} tokens, fewer than one block of {length}; give more text")
    return torch.tensor(stream[: blocks * length], dtype=torch.long).view(blocks, length)[:limit]


def token_windows(text: Path, tokenizer: PreTrainedTokenizerBase, length: int, limit: int, shortest: int = 16) -> list[Window]:
    """Up to `limit` windows of at most `length` tokens, taken from as many documents as there are, each led by BOS.

    Rounds over the documents: the first window of each, then the second of each. Windows under `shortest` tokens are left out.
    """
    documents = [ids[1:] if _bos(tokenizer) else ids for ids in _encode(text, tokenizer)]
    lead = _bos(tokenizer)
    body = length - len(lead)
    windows: list[Window] = []
    for start in range(0, max((len(ids) for ids in documents), default=0), body):
        for ids in documents:
            piece = ids[start : start + body]
            if len(lead) + len(piece) >= shortest and len(windows) < limit:
                scored = piece if lead else piece[1:]
                windows.append(Window(lead + piece, len(str(tokenizer.decode(scored)).encode())))
    if not windows:
        raise DataError(f"the text holds no document of {shortest} tokens; give more or longer text")
    return windows


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _encode(text: Path, tokenizer: PreTrainedTokenizerBase, seed: int | None = None) -> Iterator[list[int]]:
    """Token ids of each document, led by BOS where the tokenizer has one, tokenized in parallel batches."""
    batch: list[str] = []
    for document in shuffled_documents(text, seed):
        batch.append(document.text)
        if len(batch) == 64:
            yield from (_bos(tokenizer) + ids for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"])
            batch = []
    if batch:
        yield from (_bos(tokenizer) + ids for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"])
