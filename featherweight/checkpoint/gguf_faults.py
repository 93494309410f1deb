"""GGUF files that hold no model, or not all of one."""

from __future__ import annotations

import re

from featherweight.checkpoint.gguf_header import ARCHITECTURE, MERGES, SCORES, TOKENS, TYPES, GgufHeader
from featherweight.checkpoint.gguf_words import cuts_of
from featherweight.errors import CheckpointError

KIND, TOKENIZER = "general.type", "tokenizer.ggml.model"
MODEL = "model"
WORDS, BYTES = "tokenizer.ggml.pre", "gpt2"
CUTTERS = ("llama", BYTES)
"""llama.cpp's names of what tokenizers are built of: SentencePiece's merges, byte-level BPE."""
UNREAD = {"gpt-oss": "whose experts and scaled rotary embeddings transformers 5.17 cannot read from GGUF files"}
"""Architectures that transformers names among those that it reads, and cannot."""
ENDS, NONE = ("bos", "eos", "eot", "eom"), 2**32 - 1
"""Tokens that texts begin and end with, and the number that stands for none."""
GATE = "ffn_gate_inp_shexp"
BLOCK = re.compile(r"\bblk\.(\d+)\.")


def readable(kind: int) -> bool:
    """Whether a tensor of ggml's type of that number can be made floats of."""
    import numpy
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    found = GGMLQuantizationType(kind)
    try:
        dequantize(numpy.zeros(GGML_QUANT_SIZES[found][1], dtype=numpy.uint8), found)
    except NotImplementedError:
        return False
    return True


def require_model(header: GgufHeader, where: str) -> None:
    """Raise CheckpointError for a file that is no language model, has no tokenizer, or numbers that nothing here reads."""
    kind = header.text(KIND) or MODEL
    if kind != MODEL:
        raise CheckpointError(f"{where} is no model but a part beside one ({KIND} is {kind}); name the model's file")
    if not header.tensors:
        raise CheckpointError(f"{where} holds no tensors, a vocabulary alone; name the model's file")
    if TOKENIZER not in header.settings:
        raise CheckpointError(
            f"{where} has no tokenizer ({TOKENIZER}); convert the model again, with its tokenizer's files beside it"
        )
    if (cutter := header.text(TOKENIZER)) not in CUTTERS:
        raise CheckpointError(
            f"{where} has a tokenizer of the kind {cutter!r}, and known are {', '.join(CUTTERS)}; "
            "give the folder that it was made from"
        )
    if (architecture := header.text(ARCHITECTURE)) in UNREAD:
        raise CheckpointError(f"{where} is a {architecture}, {UNREAD[architecture]}; give the folder that it was made from")
    cut = header.text(WORDS)
    if cutter == BYTES and cut is not None and cuts_of(cut) is None:
        raise CheckpointError(
            f"{where} cuts texts into words as '{cut}' does ({WORDS}), which neither transformers nor anything here knows: "
            "it would read other tokens than it was trained on; give the folder that it was made from"
        )
    _require_pieces(header, where)
    _require_ends(header, where)
    _require_blocks(header, where)
    _require_kinds(header, where)
    _require_gates(header, where)
    kinds = {tensor.kind: name for name, tensor in header.tensors.items()}
    if odd := next((kind for kind in kinds if not readable(kind)), None):
        raise CheckpointError(
            f"{where}: {kinds[odd]} is of the type {header.tensors[kinds[odd]].type}, which gguf makes no floats of; "
            "quantize the model again, to another type, or give the folder that it was made from"
        )


def _require_pieces(header: GgufHeader, where: str) -> None:
    """Refuse a tokenizer that lacks a list of what it is built of, or whose lists are not of one length."""
    pieces, wanted = header.count(TOKENS), MERGES if header.text(TOKENIZER) == BYTES else SCORES
    if not pieces or header.count(wanted) is None:
        raise CheckpointError(
            f"{where} has no {wanted if pieces else TOKENS}, which its tokenizer is built of; convert the model again"
        )
    for name in (SCORES, TYPES):
        if (count := header.count(name)) not in (None, pieces):
            raise CheckpointError(f"{where}: its tokenizer has {pieces} tokens and {count} in {name}; convert the model again")


def _require_ends(header: GgufHeader, where: str) -> None:
    """Refuse a beginning or an end of texts that is no token: texts would have none, without a word."""
    pieces = header.pieces or 0
    for name in ENDS:
        key = f"tokenizer.ggml.{name}_token_id"
        number = header.number(key)
        if number is not None and pieces <= number < NONE:
            raise CheckpointError(f"{where}: {key} is {number:g}, and its tokenizer has {pieces} tokens; convert the model again")


def _require_blocks(header: GgufHeader, where: str) -> None:
    """Refuse blocks beyond those that the file counts: transformers leaves them out without a word."""
    key = f"{header.text(ARCHITECTURE)}.block_count"
    told, last = header.number(key), max((int(found[1]) for name in header.tensors if (found := BLOCK.search(name))), default=-1)
    if told is not None and last >= told:
        raise CheckpointError(f"{where} has the block {last}, and {key} is {told:g}; convert the model again")


def _require_kinds(header: GgufHeader, where: str) -> None:
    """Refuse an LFM2 that does not tell which of its layers convolve (no key heads) and which attend."""
    if header.text(ARCHITECTURE) != "lfm2":
        return
    key, blocks = "lfm2.attention.head_count_kv", header.number("lfm2.block_count")
    told = header.numbers(key) or []
    if header.number(key) is not None or len(told) != blocks or not any(told):
        raise CheckpointError(
            f"{where} does not tell which layers convolve and which attend ({key} has no number for each); convert the model again"
        )


def _require_gates(header: GgufHeader, where: str) -> None:
    """Refuse gates of shared experts that are matrices: transformers puts a row around each, and fails as it loads them."""
    if odd := next((name for name, tensor in header.tensors.items() if GATE in name and len(tensor.shape) != 1), None):
        raise CheckpointError(f"{where}: {odd} is a matrix, where llama.cpp's converter writes a vector; convert the model again")
