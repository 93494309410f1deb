"""What llama.cpp holds while it serves, by the header of its file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.files import Listing
from featherweight.checkpoint.gguf_header import read_gguf
from featherweight.runtimes.bytes_read import HeldTensor, Role
from featherweight.runtimes.llama_cpp.shapes import experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EMBEDDING, HEAD, POSITIONS = "token_embd.weight", "output.weight", "position_embd.weight"
EXPERTS = "_exps.weight"
"""What the matrices of all experts of a layer end with."""


def file_tensors(folder: Path, name: str, config: PreTrainedConfig) -> Iterator[HeldTensor]:
    """Every tensor is read for each token; of an embedding that is not the head, and of positions, one row; some of the experts."""
    tensors = read_gguf(Listing.of(folder), name).tensors
    tables = {POSITIONS, *((EMBEDDING,) if HEAD in tensors else ())}
    asked = config.num_experts_per_tok / count if (count := experts(config)) else 1.0
    for tensor, told in tensors.items():
        role: Role = "row" if tensor in tables else "step"
        yield HeldTensor(role, told.end - told.begin, told.shape[-1], asked if tensor.endswith(EXPERTS) else 1.0)
