"""What llama.cpp holds while it serves, by the header of its file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from featherweight.checkpoint.files import Listing
from featherweight.checkpoint.gguf_header import read_gguf
from featherweight.runtimes.bytes_read import HeldTensor, Role

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def file_tensors(folder: Path, name: str) -> Iterator[HeldTensor]:
    """Every tensor is read for each token, of an embedding that is not the head as well one row."""
    tensors = read_gguf(Listing.of(folder), name).tensors
    for tensor, told in tensors.items():
        role: Role = "row" if tensor == EMBEDDING and HEAD in tensors else "step"
        yield HeldTensor(role, told.end - told.begin, told.shape[-1])
