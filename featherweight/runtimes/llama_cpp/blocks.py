"""ggml's blocks of 32 weights: Q8_0 and Q4_0, made of a grid's own integers and scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featherweight.errors import StageError
from featherweight.grid import Grid
from featherweight.store.mapped import give_back

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from featherweight.model.quantized_weights import QuantizedWeights

KIND_OF = {"int8-g32": "Q8_0", "int4-g32": "Q4_0"}
"""The type of ggml's that holds a grid: its integers, and a float16 scale for each 32 of them."""


def kind(name: str, grid: Grid, q: Tensor) -> Any:
    """ggml's type of a matrix of integers [rows, columns] on `grid`. Raises StageError where it has none."""
    from gguf import GGMLQuantizationType

    if grid.name not in KIND_OF or q.shape[1] % 32:
        raise StageError(f"llama.cpp has no blocks for {name}, {q.shape[1]} columns on {grid.name}; take int8-g32 or int4-g32")
    return GGMLQuantizationType[KIND_OF[grid.name]]


def pack_parameter(name: str, quantized: QuantizedWeights) -> ndarray:
    """`pack` of one of the quantized weights."""
    made, _ = pack(name, quantized.grids[name], quantized.q[name].cpu(), quantized.scales[name].cpu())
    give_back(quantized.q[name])
    return made


def pack(name: str, grid: Grid, q: Tensor, scales: Tensor) -> tuple[ndarray, Any]:
    """(uint8 [rows, bytes of a row], ggml's type) of a matrix: q int8 [rows, columns], scales [rows, columns / 32].

    A block is a float16 scale and 32 integers: signed bytes, or halves of 16 bytes, offset by 8, the low ones first. Raises
    StageError where float16 does not hold a scale exactly: nothing is rounded a second time.
    """
    import numpy

    found, rows = kind(name, grid, q), len(q)
    wide = scales.float().numpy().reshape(-1, 1)
    with numpy.errstate(over="ignore"):
        half = wide.astype("<f2")
    if not numpy.array_equal(half.astype(numpy.float32), wide):
        raise StageError(f"the scales of {name} are no float16 numbers, which {KIND_OF[grid.name]} holds; quantize it anew")
    integers = numpy.ascontiguousarray(q.numpy()).reshape(-1, 32)
    if grid.bits == 4:
        offset = (integers + 8).astype(numpy.uint8)
        packed = offset[:, :16] | (offset[:, 16:] << 4)
    else:
        packed = integers.view(numpy.uint8)
    blocks = numpy.concatenate([half.view(numpy.uint8), packed], axis=1)
    return blocks.reshape(rows, -1), found
