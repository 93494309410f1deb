"""Which tokens a recipe has a use for: those of its text, of a list, of scripts, or those that the model itself expects."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.pieces import BYTE, Pieces
from featherweight.errors import RecipeError
from featherweight.model.heads import SentenceEmbedding, answers
from featherweight.text.documents import read_documents
from featherweight.text.model_inputs import inputs_and_labels

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

BATCH = 256


def used_in(folders: Iterable[Path], tokenizer: Any, config: PreTrainedConfig) -> set[int]:
    """Ids of the tokens of all documents: their texts, pairs, and the targets as the tokenizer cuts those; of prompts too."""
    documents = chain.from_iterable(map(read_documents, folders))
    sentence = SentenceEmbedding.of(config)
    prompts = [text for name in sentence.prompts if (text := sentence.prepared("", name))]
    found = _ids(tokenizer(prompts, verbose=False)) if prompts else set()
    while batch := list(islice(documents, BATCH)):
        texts = [sentence.prepared(text) for one in batch for text in (one.text, one.pair) if text]
        found |= _ids(tokenizer(texts, verbose=False))
        # A text that has no target of its own is cut into a source and a target.
        if config.is_encoder_decoder:
            found |= _ids(tokenizer(text_target=[one.target or one.text for one in batch], verbose=False))
    return found


def _ids(told: Any) -> set[int]:
    return set(chain.from_iterable(told["input_ids"]))


def expected_by(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """How often `model` expects each token in place of what `blocks` have (see text/model_inputs.py): float64 [vocabulary].

    The probabilities of all tokens, summed over the positions: of what might stand there, not of what does alone.
    """
    import torch

    model.eval()
    expected = torch.zeros(1, dtype=torch.float64)
    with torch.inference_mode():
        for block in blocks.split(1):
            logits = answers(model, inputs_and_labels(model.config, block.to(model.device))[0])
            expected = expected + logits.float().softmax(-1).flatten(0, -2).sum(0, dtype=torch.float64).cpu()
    return expected


def likeliest(expected: Tensor, count: int) -> set[int]:
    """Ids of the `count` most expected tokens of `expected` [vocabulary]; of equals the lower ids."""
    return set(expected.sort(descending=True, stable=True).indices[:count].tolist())


def listed(tokens: Collection[str], pieces: Pieces) -> set[int]:
    """Ids of the tokens of a list. Raises RecipeError for one that the tokenizer does not have."""
    known = {**pieces.ids, **{content: place for place, content in pieces.added.items()}}
    unknown = [token for token in tokens if token not in known]
    if unknown:
        raise RecipeError(
            f"prune.keep.tokens: the tokenizer has no {unknown[0]!r}, and {len(unknown)} of {len(tokens)} are unknown; "
            "spell them as the tokenizer does"
        )
    return {known[token] for token in tokens}


def written_in(scripts: Collection[str], pieces: Pieces) -> set[int]:
    """Ids of the tokens whose letters are all of these scripts, and of those without a letter (digits, punctuation)."""
    names = {script.upper() for script in scripts}
    texts = ((place, spelt(piece, pieces)) for place, piece in pieces.spelt.items())
    return {place for place, text in texts if text is not None and all(name in names for name in _scripts(text))}


def _scripts(text: str) -> Iterator[str]:
    """The first word of the Unicode name of each letter, which is its script."""
    return (unicodedata.name(one, "?").partition(" ")[0] for one in text if unicodedata.category(one)[0] in "LM")


def spelt(piece: str, pieces: Pieces) -> str | None:
    """What a piece stands for in a text; None for a part of a character."""
    if BYTE.fullmatch(piece):
        return None
    if not pieces.byte_level:
        return pieces.letters(piece).replace("▁", " ")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    try:
        return bytes(byte_of[letter] for letter in piece).decode()
    except (KeyError, UnicodeDecodeError):  # a special token, or the middle of a character
        return None
