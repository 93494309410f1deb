"""The tokenizer that a GGUF file describes, built here of its pieces.

transformers 5.17 makes a Unigram model of Gemma's SentencePiece (llama.cpp's kind "llama"), which cuts other pieces than the model
was trained on and falls apart into characters once it is saved. Of byte-level BPE (llama.cpp's kind "gpt2") it knows three tokens
of Qwen's to be whole, and none of others: it cuts all else that the file calls a token of its own into letters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import Listing
from featherweight.checkpoint.gguf_header import ARCHITECTURE, read_gguf
from featherweight.checkpoint.gguf_words import WHOLE, cut_as_named, name_of
from featherweight.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SENTENCEPIECE = "llama"
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""ggml's token types (llama.h's llama_token_type) that are cut out of a text before anything is merged."""
NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""GGUF's names of special tokens and transformers'."""
ASSUMED = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True, "add_space_prefix": True}
"""What llama.cpp takes where a file with a SentencePiece tokenizer says nothing."""
SPACE = "▁"


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with the special tokens that it names; raises CheckpointError where it is damaged."""
    header = read_gguf(Listing.of(file.parent), file.name)
    told = {key.removeprefix("tokenizer.ggml."): header.value(key) for key in header.settings}
    return (_sentencepiece if told.get("model") == SENTENCEPIECE else _byte_level)(told)


def _byte_level(told: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Words of bytes, whose letters are merged as the file lists it."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    tokens, kinds = _typed(told)
    ids = {token: number for number, token in enumerate(tokens)}
    built = Tokenizer(BPE(ids, [tuple(pair.split(" ", 1)) for pair in told["merges"]]))
    name = name_of(told.get("pre"), str(told.get(ARCHITECTURE)))
    cut_as_named(built, name)
    return _framed(_with_whole(built, tokens, kinds), {"add_bos_token": name in WHOLE} | dict(told))


def _sentencepiece(said: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    told = ASSUMED | dict(said)
    tokens, kinds = _typed(told)
    if len(tokens) != len(told["scores"]):
        raise CheckpointError(f"{len(tokens)} tokens and {len(told['scores'])} scores")
    unknown = _named(tokens, told["unknown_token_id"])
    built = _merging(tokens, told["scores"], unknown, prefix=bool(told["add_space_prefix"]))
    return _framed(_with_whole(built, tokens, kinds), told)


def _typed(told: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[int]]:
    """The pieces and llama.cpp's type of each; all are plain where the file does not say."""
    tokens = told["tokens"]
    kinds = told.get("token_type") or [1] * len(tokens)
    if len(tokens) != len(kinds):
        raise CheckpointError(f"{len(tokens)} tokens and {len(kinds)} token types")
    return tokens, kinds


def _framed(built: Tokenizer, told: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """With the special tokens that the file names, what it puts round each text, and its chat template."""
    from transformers import PreTrainedTokenizerFast

    named = {f"{ours}_token": _named(told["tokens"], told.get(f"{theirs}_token_id")) for theirs, ours in NAMES.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        add_bos_token=bool(told.get("add_bos_token")),
        add_eos_token=bool(told.get("add_eos_token")),
        chat_template=told.get("tokenizer.chat_template"),
        **named,
    )


def _named(tokens: Sequence[str], number: int | None) -> str | None:
    return None if number is None or not 0 <= number < len(tokens) else tokens[number]


def _merging(tokens: Sequence[str], scores: Sequence[float], unknown: str | None, *, prefix: bool) -> Tokenizer:
    """What llama.cpp's llm_tokenizer_spm does, as a model of the tokenizers library."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    ids = {token: number for number, token in enumerate(tokens)}
    built = Tokenizer(BPE(ids, list(merges(ids, scores)), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replaced = normalizers.Replace(" ", SPACE)
    built.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replaced]) if prefix else replaced
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return built


def _with_whole(built: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> Tokenizer:
    """Cutting out of a text, before anything is merged, what the file calls a token of its own."""
    from tokenizers import AddedToken

    apart = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    built.add_tokens([AddedToken(token, normalized=False) for token, kind in apart if kind == USER_DEFINED])
    built.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, kind in apart if kind != USER_DEFINED])
    return built


def merges(ids: Mapping[str, int], scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Every two tokens that make a third, in the order in which SentencePiece merges them: by the score of what they make."""
    for token in sorted(ids, key=lambda token: -scores[ids[token]]):
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in ids and right in ids:
                yield left, right
