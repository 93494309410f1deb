"""GGUF files that hold no model, or not all of one."""

from __future__ import annotations

from featherweight.checkpoint.gguf_header import GgufHeader
from featherweight.errors import CheckpointError

KIND, TOKENIZER = "general.type", "tokenizer.ggml.model"
MODEL = "model"


def require_model(header: GgufHeader, where: str) -> None:
    """Raise CheckpointError for a file that is no language model, or has no tokenizer."""
    kind = header.text(KIND) or MODEL
    if kind != MODEL:
        raise CheckpointError(f"{where} is no model but a part beside one ({KIND} is {kind}); name the model's file")
    if not header.tensors:
        raise CheckpointError(f"{where} holds no tensors, a vocabulary alone; name the model's file")
    if TOKENIZER not in header.settings:
        raise CheckpointError(
            f"{where} has no tokenizer ({TOKENIZER}); convert the model again, with its tokenizer's files beside it"
        )
