"""What PyTorch's quantized engines hold while they serve."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.runtimes.bytes_read import HeldTensor, Roles, headers
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


NF4_BLOCK = 64
"""Weights that share a scale in float32 (bitsandbytes' default, scales not rounded in their turn)."""


def bitsandbytes_tensors(folder: Path, rounded: str, config: PreTrainedConfig) -> Iterator[HeldTensor]:
    """A checkpoint whose matrices bitsandbytes rounds at load, 'nf4' or 'llm.int8'; the vocabulary and the rest are in float16."""
    roles = Roles(config)
    for name, shape, _, _ in headers(folder):
        path, weights = name.rpartition(".")[0], math.prod(shape)
        role, share = roles.of(path)
        size = 2.0 * weights
        if len(shape) == 2 and role != "row" and not roles.is_vocabulary(path):
            size = weights / 2 + 4 * math.ceil(weights / NF4_BLOCK) if rounded == "nf4" else weights + 4.0 * shape[0]
        yield HeldTensor(role, size, shape[0] if shape else 0, share)
