"""What PyTorch's quantized engines hold while they serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.runtimes.bytes_read import HeldTensor, Roles
from featherweight.runtimes.torch.formats import Format
from featherweight.runtimes.torch.storage import Packed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def packed_tensors(folder: Path, format: Format, config: PreTrainedConfig) -> Iterator[HeldTensor]:
    """PyTorch's quantized engines: an integer takes a byte whatever its bits; the vocabulary is float where they say so."""
    roles, packed = Roles(config), Packed.read(folder)
    for name, q in packed.quantized.q.items():
        path = name.removesuffix(".weight")
        role, share = roles.of(path)
        scales = packed.quantized.scales[name]
        floats = not format.vocabulary and roles.is_vocabulary(path)
        size = q.numel() * 4 if floats else q.numel() + scales.numel() * 4
        yield HeldTensor(role, size, q.shape[0], share)
    for name, tensor in packed.rest.items():
        role, share = roles.of(name.rpartition(".")[0])
        yield HeldTensor(role, tensor.numel() * 4, tensor.shape[0] if tensor.ndim else 0, share)
