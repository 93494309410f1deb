"""What a GGUF file says of its model and transformers, which reads it here, takes no notice of; and files that hold no model."""

from __future__ import annotations

import struct

from featherweight.checkpoint.gguf_header import GgufHeader
from featherweight.errors import CheckpointError

ARCHITECTURE, KIND, TOKENIZER = "general.architecture", "general.type", "tokenizer.ggml.model"
MODEL = "model"
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of a factor for each frequency of the rotary embeddings (Llama 3.1 and later, Phi-3)."""
UNSCALED = "none"
READ = ("gpt-oss",)
"""Architectures whose scaling of rotary embeddings transformers 5.17 reads."""


def require_model(header: GgufHeader, where: str) -> None:
    """Raise CheckpointError for a file that is no language model, or one that transformers would compute otherwise."""
    kind = _text(header, KIND) or MODEL
    if kind != MODEL:
        raise CheckpointError(f"{where} is no model but a part beside one ({KIND} is {kind}); name the model's file")
    if not header.tensors:
        raise CheckpointError(f"{where} holds no tensors, a vocabulary alone; name the model's file")
    if TOKENIZER not in header.settings:
        raise CheckpointError(
            f"{where} has no tokenizer ({TOKENIZER}); convert the model again, with its tokenizer's files beside it"
        )
    if (scaled := _scaled(header)) is not None:
        raise CheckpointError(
            f"{where} scales its rotary embeddings ({scaled}), which transformers takes no notice of in GGUF files: it would be "
            "another model; give the folder that the file was made from"
        )


def _scaled(header: GgufHeader) -> str | None:
    """The setting or the tensor by which rotary embeddings are scaled."""
    architecture = _text(header, ARCHITECTURE)
    if architecture in READ:
        return None
    key = f"{architecture}.rope.scaling.type"
    told = _text(header, key) or UNSCALED
    return f"{key} is {told}" if told != UNSCALED else next((name for name in FACTORS if name in header.tensors), None)


def _text(header: GgufHeader, key: str) -> str | None:
    """A setting that is text; None where it is not there."""
    value = header.settings.get(key)
    if value is None or len(value) < 12:
        return None
    (length,) = struct.unpack("<Q", value[4:12])
    return value[12 : 12 + length].decode("utf-8", "replace")
