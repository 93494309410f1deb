"""Examples for encoders that answer a text at once (embeddings, labels, a label for each token).

A block is int64 [3 * length]: token ids, which of two texts each belongs to (-1 for padding), and labels, IGNORED where there is
none. A block of embeddings is two of these, [6 * length]: two texts that belong together, a document's pair or its halves.
Where the documents have no labels, those that the checkpoint itself finds likeliest take their place: what it is trained, pruned
or quantized on is then what it answers already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.opening import load_model
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import DataError
from featherweight.model.architecture import task_of
from featherweight.model.heads import SentenceEmbedding, answers, by_label, takes_types
from featherweight.text.documents import Document, read_documents, shuffled_documents
from featherweight.text.labels import IGNORED, label_ids
from featherweight.text.tokens import Frame, Window, encode

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

PADDING = -1
SHORTEST = 3
"""Fewest tokens of a piece of a text that is worth an answer."""
BATCH = 16


@dataclass(frozen=True)
class Example(Window):
    """A framed text, or two. types: which of the two each token belongs to. labels: of its answers, none where nobody knows them.

    Of a text's labels there is one; or one (0 or 1) for each that stands by itself; or one for each token, IGNORED inside of
    words and where the frame is.
    """

    types: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def examples(config: PreTrainedConfig, tokenizer: Any, documents: Iterable[Document], length: int) -> Iterator[Example]:
    """Examples of up to `length` tokens: a document that has a label or a pair is one, cut; any other as many as it has pieces.

    Of embeddings, for which there are no labels, the texts of a pair are an example each.
    """
    sentence, frame = SentenceEmbedding.of(config), Frame.of(tokenizer)
    vectors = task_of(config) == "feature-extraction"
    for document in documents:
        if vectors or (document.label is None and document.pair is None):
            yield from _pieces(sentence, tokenizer, frame, document, length)
        else:
            yield _whole(config, tokenizer, document, length)


def _pieces(sentence: SentenceEmbedding, tokenizer: Any, frame: Frame, document: Document, length: int) -> Iterator[Example]:
    body = length - len(frame.lead) - len(frame.tail)
    for text in (document.text, document.pair or ""):
        whole = encode(tokenizer, sentence.prepared(text), add_special_tokens=False)
        for start in range(0, len(whole.ids), max(1, body)):
            ids = whole.ids[start : start + body]
            if len(ids) >= SHORTEST or not start:
                framed = [*frame.lead, *ids, *frame.tail]
                yield Example(framed, sum(whole.sizes[start : start + body]), types=[0] * len(framed))


def _whole(config: PreTrainedConfig, tokenizer: Any, document: Document, length: int) -> Example:
    told = encoded(config, tokenizer, document.text, document.pair, length)
    size = len(document.content.encode(errors="surrogatepass"))
    labels = [] if document.label is None else label_ids(config, tokenizer, document, told)
    return Example(list(told["input_ids"]), size, types=types_of(told), labels=labels)


def encoded(
    config: PreTrainedConfig,
    tokenizer: Any,
    text: str,
    pair: str | None,
    length: int | None,
    prompt: str | None = None,
    **options: Any,
) -> Any:
    """What the tokenizer makes of a text or two, as its files say, cut to `length` tokens (None: not cut).

    prompt: the name of one that stands before the text.
    """
    cut = {} if length is None else {"truncation": True, "max_length": length}
    return tokenizer(SentenceEmbedding.of(config).prepared(text, prompt), pair, verbose=False, **cut, **options)


def types_of(told: Mapping[str, Any]) -> list[int]:
    """Which of two texts each token belongs to; all to the first where the tokenizer does not tell."""
    return list(told.get("token_type_ids") or [0] * len(told["input_ids"]))


def head_windows(folder: Path, config: PreTrainedConfig, text: Path, length: int, limit: int) -> list[Example]:
    """Up to `limit` examples of a text folder, in the tokens of the model in `folder`. Raises DataError where there is none."""
    found = list(islice(examples(config, load_tokenizer(folder), read_documents(text), length), limit))
    return found or _refuse()


def _refuse() -> Any:
    raise DataError("the text holds no document that makes an example; give more text")


def head_blocks(
    checkpoint: Path, config: PreTrainedConfig, text: Path, length: int, limit: int | None = None, seed: int | None = None
) -> Tensor:
    """Blocks of `text` for the model in `checkpoint`, see the head of this file: int64 [blocks, 3 * length] or [.., 6 * length]."""
    import torch

    tokenizer, documents = load_tokenizer(checkpoint), shuffled_documents(text, seed)
    if task_of(config) == "feature-extraction":
        pairs = islice(_related(config, tokenizer, documents, length), limit)
        rows = [_row(config, one, length) + _row(config, other, length) for one, other in pairs]
        return torch.tensor(rows or _refuse())
    found = list(islice(examples(config, tokenizer, documents, length), limit)) or _refuse()
    blocks = torch.tensor([_row(config, one, length) for one in found])
    without = torch.tensor([not one.labels for one in found])
    if without.any():
        blocks[without] = _self_labelled(checkpoint, blocks[without])
    return blocks


def _row(config: PreTrainedConfig, one: Example, length: int) -> list[int]:
    if len(one.labels) > length:
        raise DataError(f"an example has {len(one.labels)} labels, more than the {length} tokens of a block; raise 'sequence'")
    more = length - len(one.ids)
    pad = config.pad_token_id or 0
    return [*one.ids, *[pad] * more, *one.types, *[PADDING] * more, *one.labels, *[IGNORED] * (length - len(one.labels))]


def _related(config: Any, tokenizer: Any, documents: Iterable[Document], length: int) -> Iterator[tuple[Example, Example]]:
    """Two texts that belong together: a document and its pair, or the halves of a piece of it."""
    sentence, frame = SentenceEmbedding.of(config), Frame.of(tokenizer)
    body = length - len(frame.lead) - len(frame.tail)
    for document in documents:
        if document.pair is not None:
            texts = (Document(document.id, text) for text in (document.text, document.pair))
            first, second = (next(_pieces(sentence, tokenizer, frame, one, length), None) for one in texts)
            if first and second:
                yield first, second
            continue
        ids = tokenizer(sentence.prepared(document.text), add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids) - 1, 2 * body):
            part = ids[start : start + 2 * body]
            halves = part[: (len(part) + 1) // 2], part[(len(part) + 1) // 2 :]
            framed = [[*frame.lead, *half, *frame.tail] for half in halves]
            yield Example(framed[0], 0, types=[0] * len(framed[0])), Example(framed[1], 0, types=[0] * len(framed[1]))


def _self_labelled(checkpoint: Path, blocks: Tensor) -> Tensor:
    """The blocks with the labels that the checkpoint finds likeliest."""
    import torch

    model = load_model(checkpoint).eval()
    labelled = blocks.clone()
    length = blocks.shape[1] // 3
    with torch.inference_mode():
        for rows in torch.arange(len(blocks)).split(BATCH):
            inputs, _ = head_inputs(model.config, blocks[rows].to(model.device))
            found = answers(model, inputs).argmax(-1).cpu()
            if task_of(model.config) == "token-classification":
                found = found.masked_fill(blocks[rows, length : 2 * length] == PADDING, IGNORED)
            labelled[rows, 2 * length : 2 * length + found.shape[1]] = found
    return labelled


def head_inputs(config: PreTrainedConfig, ids: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Keyword arguments of the model's forward for blocks `ids`, and the labels of its answers, int64 [batch, positions].

    Of embeddings the batch is twice as long, all first texts before all second ones, and the labels are 0.
    """
    import torch

    task = task_of(config)
    if task == "feature-extraction":
        ids = torch.cat(ids.chunk(2, dim=1))
    tokens, types, labels = ids.chunk(3, dim=1)
    inputs = {"input_ids": tokens, "attention_mask": (types != PADDING).long()}
    if takes_types(config):
        inputs["token_type_ids"] = types.clamp_min(0)
    if task == "feature-extraction":
        return inputs, torch.zeros_like(labels[:, :1])
    if task == "text-classification":
        labels = labels[:, : config.num_labels if by_label(config) else 1]
    return inputs, labels


def packed_inputs(config: PreTrainedConfig, ids: list[list[int]], types: list[list[int]]) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward for sequences of any lengths, padded to the longest."""
    import torch

    longest = max(map(len, ids))
    pad = config.pad_token_id or 0
    inputs = {
        "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
    }
    if takes_types(config):
        inputs["token_type_ids"] = torch.tensor([row + [0] * (longest - len(row)) for row in types])
    return inputs
