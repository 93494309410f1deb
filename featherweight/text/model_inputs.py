"""Examples: what a model of each family reads and what it has to predict, from one block of token ids.

A block is int64 [length] for causal models: every token is to be predicted from those before it. For the other families it is
int64 [2 * length], a source and a target: a text and its translation (or its first and second half), padded; or a text with
15 % of its tokens masked, and the text itself; what encoders with another head read, featherweight/text/examples.py says. So
every stage handles blocks alike, and only these modules know the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import CheckpointError, DataError
from featherweight.model.architecture import Role, family_of, task_of
from featherweight.spec import HEADED
from featherweight.text.documents import shuffled_documents
from featherweight.text.examples import head_blocks, head_inputs, head_windows
from featherweight.text.labels import IGNORED
from featherweight.text.tokens import (
    Encoded,
    Window,
    encode,
    encode_target,
    framed_pieces,
    token_blocks,
    token_windows,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

MASKED = 0.15
"""Share of the tokens that an encoder has to fill in (Devlin et al. 2018)."""
SHORTEST = 8
"""Fewest tokens of a text of which an encoder is to fill in some."""


def example_blocks(
    checkpoint: Path, config: PreTrainedConfig, text: Path, length: int, limit: int | None = None, seed: int | None = None
) -> Tensor:
    """Blocks of `text` for the model in `checkpoint`: int64 [blocks, length], or [blocks, 2 * length] (see the module).

    With a `seed` the documents come in a random order, so that a `limit` takes a sample. Raises DataError for too little text.
    """
    if task_of(config) in HEADED:
        return head_blocks(checkpoint, config, text, length, limit, seed)
    tokenizer = load_tokenizer(checkpoint)
    family = family_of(config)
    if family == "seq2seq":
        return _pairs(config, tokenizer, text, length, limit, seed)
    ids = token_blocks(text, tokenizer, length, limit=limit, seed=seed)
    return _masked(ids, tokenizer, seed or 0) if family == "encoder" else ids


def inputs_and_labels(config: Any, ids: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Keyword arguments of a model's forward for `ids` [batch, block], and the labels of its logits.

    The labels are aligned with the logits (int64 [batch, positions]), IGNORED where nothing is to be predicted.
    """
    import torch

    if task_of(config) in HEADED:
        return head_inputs(config, ids)

    family = family_of(config)
    if family == "causal":
        return {"input_ids": ids, "use_cache": False}, next_tokens(ids)
    source, target = ids.chunk(2, dim=1)
    if family == "encoder":
        return {"input_ids": source}, torch.where(source == target, IGNORED, target)
    pad = _pad(config)
    decoder = torch.cat([torch.full_like(target[:, :1], decoder_start(config)), target[:, :-1]], dim=1)
    inputs = {"input_ids": source, "attention_mask": (source != pad).long(), "decoder_input_ids": decoder, "use_cache": False}
    return inputs, torch.where(target == pad, IGNORED, target)


def unpadded_inputs(config: Any, ids: Tensor, batch: int) -> list[dict[str, Any]]:
    """Keyword arguments of a model's forward for the blocks `ids`, up to `batch` of one shape together: no position is padding."""
    import torch

    inputs, labels = inputs_and_labels(config, ids)
    if task_of(config) in HEADED:
        return _unpadded(inputs, batch)
    if "decoder_input_ids" not in inputs:
        return [inputs_and_labels(config, part)[0] for part in ids.split(batch)]
    real = real_positions(inputs, labels)
    shapes: dict[tuple[int, int], list[int]] = {}
    for row, shape in enumerate(zip(_lengths(real["encoder"]), _lengths(real["decoder"]), strict=True)):
        shapes.setdefault(shape, []).append(row)
    ends = {"input_ids": 0, "attention_mask": 0, "decoder_input_ids": 1}
    return [
        {name: inputs[name][rows, : shape[end]] for name, end in ends.items()} | {"use_cache": False}
        for shape, every in shapes.items()
        for rows in torch.tensor(every).split(batch)
    ]


def _unpadded(inputs: Mapping[str, Tensor], batch: int) -> list[dict[str, Any]]:
    """Inputs of an encoder in batches of one length each, in which every position is read."""
    import torch

    rows: dict[int, list[int]] = {}
    for row, length in enumerate(_lengths(inputs["attention_mask"])):
        rows.setdefault(length, []).append(row)
    return [
        {name: tensor[some, :length] for name, tensor in inputs.items() if name != "attention_mask"}
        for length, every in rows.items()
        for some in torch.tensor(every).split(batch)
    ]


def _lengths(real: Tensor) -> list[int]:
    """Positions of each row of `real` up to its last true one; one at least."""
    import torch

    lengths: list[int] = (real * torch.arange(1, real.shape[1] + 1)).amax(1).clamp(min=1).tolist()
    return lengths


def scoring_windows(checkpoint: Path, config: PreTrainedConfig, text: Path, length: int, limit: int) -> list[Window]:
    """Up to `limit` windows of `text`, of at most `length` tokens a sequence, for the model in `checkpoint`; see Window.

    The same checkpoint and text give the same windows, masks included. Raises DataError for too little text.
    """
    if task_of(config) in HEADED:
        return list(head_windows(checkpoint, config, text, length, limit))
    tokenizer, family = load_tokenizer(checkpoint), family_of(config)
    if family == "causal":
        return token_windows(text, tokenizer, length, limit)
    return (_pair_windows if family == "seq2seq" else _masked_windows)(config, tokenizer, text, length, limit)


def _pair_windows(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, text: Path, length: int, limit: int
) -> list[Window]:
    start, pairs = decoder_start(config), _scored_pairs(tokenizer, text, length, limit)
    return [Window([start, *target.ids], target.text_bytes, source.ids) for source, target in pairs]


def sources_and_targets(checkpoint: Path, text: Path, length: int, limit: int) -> list[tuple[list[int], str]]:
    """For each of the seq2seq `scoring_windows` its source, cut to fit, and the whole text of the document's target."""
    return [(source.ids, target.whole.text) for source, target in _scored_pairs(load_tokenizer(checkpoint), text, length, limit)]


def _scored_pairs(tokenizer: PreTrainedTokenizerBase, text: Path, length: int, limit: int) -> list[tuple[Part, Part]]:
    every = _encoded_pairs(text, tokenizer, length - 1, seed=0)
    pairs = list(islice(((source, target) for source, target in every if source.ids and target.text_bytes), limit))
    if not pairs:
        raise DataError("the text holds no document of two tokens to make a source and a target of; give more text")
    return pairs


def _masked_windows(_: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, text: Path, length: int, limit: int) -> list[Window]:
    """Texts as the tokenizer frames them ([CLS] ... [SEP]), some of their tokens masked, the same ones every time."""
    import torch

    windows = []
    for number, (ids, sizes) in enumerate(framed_pieces(text, tokenizer, length, limit, SHORTEST)):
        source = _masked(torch.tensor([ids]), tokenizer, number)[0, : len(ids)].tolist()
        masked = sum(size for size, token, there in zip(sizes, ids, source, strict=True) if token != there)
        windows.append(Window(ids, masked, source))
    return windows


def window_inputs(config: Any, ids: Tensor, source: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Like `inputs_and_labels`, for the `ids` and the `source` of windows of one shape (int64 [batch, length] each)."""
    import torch

    family = family_of(config)
    if family == "encoder":
        return {"input_ids": source}, torch.where(source == ids, IGNORED, ids)
    inputs = {"input_ids": ids[:, :-1]} if family == "causal" else {"input_ids": source, "decoder_input_ids": ids[:, :-1]}
    return {**inputs, "use_cache": False}, ids[:, 1:]


def decoder_prefix(model: Any) -> list[int]:
    """What a seq2seq decoder is given to begin with: its start token, and the language that its checkpoint forces, if any."""
    forced = getattr(model.generation_config, "forced_bos_token_id", None)
    return [decoder_start(model.config), *([] if forced is None else [int(forced)])]


def real_positions(inputs: Mapping[str, Any], labels: Tensor) -> dict[Role, Tensor]:
    """Positions of each stack that are no padding, bool [batch, positions]."""
    import torch

    if "decoder_input_ids" in inputs:
        return {"encoder": inputs["attention_mask"].bool(), "decoder": labels != IGNORED}
    there = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(labels, dtype=torch.bool)
    return {"encoder": there, "decoder": there}


def next_tokens(ids: Tensor) -> Tensor:
    """Labels aligned with the logits: ids moved one to the left, IGNORED at the end. int64 [batch, length]."""
    import torch

    return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)


def decoder_start(config: PreTrainedConfig) -> int:
    """The token that a seq2seq decoder begins with."""
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise CheckpointError("the seq2seq checkpoint names no decoder_start_token_id in its config.json; add it")
    return int(start)


def _pad(config: PreTrainedConfig) -> int:
    if config.pad_token_id is None:
        raise CheckpointError("the seq2seq checkpoint names no pad_token_id in its config.json; add it")
    return int(config.pad_token_id)


def _masked(ids: Tensor, tokenizer: PreTrainedTokenizerBase, seed: int) -> Tensor:
    """[blocks, length] -> [blocks, 2 * length]: a masked copy of each, then the block. At least one token is masked."""
    import torch

    if tokenizer.mask_token_id is None:
        raise CheckpointError("the encoder's tokenizer has no mask token, which training and measuring it needs; add one")
    draws = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    draws[torch.isin(ids, torch.tensor(tokenizer.all_special_ids))] = 1.0
    chosen = draws < MASKED
    chosen.scatter_(1, draws.argmin(1, keepdim=True), True)
    return torch.cat([ids.masked_fill(chosen, tokenizer.mask_token_id), ids], dim=1)


def _pairs(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, text: Path, length: int, limit: int | None, seed: int | None
) -> Tensor:
    """[blocks, 2 * length]: a source and a target each, cut and padded to `length`."""
    import torch

    pad = _pad(config)
    pairs = islice(token_pairs(text, tokenizer, length, seed), limit)
    rows = [_padded(source, length, pad) + _padded(target, length, pad) for source, target in pairs]
    if not rows:
        raise DataError("the text holds no document of two tokens to make a source and a target of; give more text")
    return torch.tensor(rows, dtype=torch.long)


def token_pairs(
    text: Path, tokenizer: PreTrainedTokenizerBase, length: int, seed: int | None = None
) -> Iterator[tuple[list[int], list[int]]]:
    """(source ids, target ids) of the documents, at most `length` of each, special tokens included.

    A document with a target of its own gives one pair. Any other is cut into pieces of up to two lengths, and the model is to
    go on from a piece's first half to its second.
    """
    return ((source.ids, target.ids) for source, target in _encoded_pairs(text, tokenizer, length, seed))


def _encoded_pairs(
    text: Path, tokenizer: PreTrainedTokenizerBase, length: int, seed: int | None = None
) -> Iterator[tuple[Part, Part]]:
    for document in shuffled_documents(text, seed):
        if document.target is not None:
            whole, target = encode(tokenizer, document.text), encode_target(tokenizer, document.target)
            yield Part(whole, 0, length), Part(target, 0, length)
            continue
        whole = encode(tokenizer, document.text, add_special_tokens=False)
        for start in range(0, len(whole.ids) - 1, 2 * length):
            end = min(start + 2 * length, len(whole.ids))
            middle = start + (end - start + 1) // 2
            yield Part(whole, start, middle), Part(whole, middle, end)


@dataclass(frozen=True)
class Part:
    """Some of a text's tokens."""

    whole: Encoded
    start: int
    end: int

    @property
    def ids(self) -> list[int]:
        return self.whole.ids[self.start : self.end]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text that the tokens stand for."""
        return sum(self.whole.sizes[self.start : self.end])


def _padded(ids: list[int], length: int, pad: int) -> list[int]:
    return ids + [pad] * (length - len(ids))
