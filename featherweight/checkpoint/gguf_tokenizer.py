"""The tokenizer that a GGUF file describes.

SentencePiece's (llama.cpp's kind "llama") is built here. transformers 5.17 makes a Unigram model of Gemma's, which cuts other
pieces than the model was trained on and falls apart into characters once it is saved; of others it looks for merges in lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.gguf_words import cut_as_named
from featherweight.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SENTENCEPIECE, BYTES = "llama", "gpt2"
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""ggml's token types (llama.h's llama_token_type) that are cut out of a text before anything is merged."""
NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""GGUF's names of special tokens and transformers'."""
ASSUMED = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True, "add_space_prefix": True}
"""What llama.cpp takes where a file with a SentencePiece tokenizer says nothing."""
SPACE = "▁"


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with the special tokens that it names; raises CheckpointError where it is damaged."""
    from transformers import AutoTokenizer
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(file), ("tokenizer.ggml.tokens",))
    told = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if told.get("model") == SENTENCEPIECE:
        return _sentencepiece(ASSUMED | told)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    if told.get("model") == BYTES:
        cut_as_named(tokenizer.backend_tokenizer, str(told.get("pre")))
    _set_special_tokens(tokenizer, told)
    return tokenizer


def _set_special_tokens(tokenizer: Any, told: Mapping[str, Any]) -> None:
    """The special tokens that the file names, and whether texts begin and end with them, where it says so.

    transformers 5.17 takes the first control token for EOS, forgets padding, and does not read `add_bos_token`.
    """
    for theirs, ours in NAMES.items():
        number = told.get(f"{theirs}_token_id")
        if number is not None:
            setattr(tokenizer, f"{ours}_token", tokenizer.convert_ids_to_tokens(int(number)))
    for end in ("bos", "eos"):
        added = told.get(f"add_{end}_token")
        if added is not None:
            setattr(tokenizer, f"add_{end}_token", bool(added))


def _sentencepiece(told: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = told["tokens"], told.get("token_type") or [1] * len(told["tokens"])
    if not len(tokens) == len(kinds) == len(told["scores"]):
        raise CheckpointError(f"{len(tokens)} tokens, {len(kinds)} token types and {len(told['scores'])} scores")
    named = {f"{ours}_token": _named(tokens, told.get(f"{theirs}_token_id")) for theirs, ours in NAMES.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=_merging(tokens, told["scores"], kinds, named["unk_token"], prefix=bool(told["add_space_prefix"])),
        add_bos_token=bool(told["add_bos_token"]),
        add_eos_token=bool(told.get("add_eos_token")),
        chat_template=told.get("tokenizer.chat_template"),
        **named,
    )


def _named(tokens: Sequence[str], number: int | None) -> str | None:
    return None if number is None or not 0 <= number < len(tokens) else tokens[number]


def _merging(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], unknown: str | None, *, prefix: bool
) -> Tokenizer:
    """What llama.cpp's llm_tokenizer_spm does, as a model of the tokenizers library."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    ids = {token: number for number, token in enumerate(tokens)}
    built = Tokenizer(BPE(ids, list(merges(ids, scores)), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replaced = normalizers.Replace(" ", SPACE)
    built.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replaced]) if prefix else replaced
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
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
