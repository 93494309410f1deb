"""Grids: the sets of values that quantized weights may take.

A grid is separate from the algorithm that chooses the weights on it (round to nearest, GPTQ, QAT ...), so that a result
reaches every runtime that can hold its grid without a second rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from featherweight.errors import RecipeError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """A symmetric grid `weight = q * scale` with q in [qmin, qmax]: an integer (a uniform grid), or a float8 (e4m3) number.

    A weight matrix has shape [rows, columns] (rows = output features, or tokens of an embedding). One scale covers a whole
    row where `group_size` is None, else `group_size` consecutive columns of a row; a last, shorter group is allowed.
    half_scales: scales are chosen among the numbers that float16 holds, which blocks of ggml's store; an integer is rounded with
    the scale that is stored, so that no engine rounds it a second time.
    """

    name: str
    bits: int
    group_size: int | None
    qmin: int
    qmax: int
    kind: Literal["int", "float"] = "int"
    half_scales: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What q is stored as."""
        import torch

        return torch.int8 if self.kind == "int" else torch.float8_e4m3fn

    @property
    def fineness(self) -> tuple[float, float, float]:
        """Greater for a finer grid: more bits, then fewer weights to a scale, then more values."""
        return self.bits, -(self.group_size or math.inf), self.qmax - self.qmin if self.kind == "int" else 0

    def round(self, steps: Tensor) -> Tensor:
        """Weights in units of their scale, moved to the nearest values that q may take; the type stays."""
        if self.kind == "int":
            return steps.round().clamp_(self.qmin, self.qmax)
        return steps.clamp(self.qmin, self.qmax).to(self.dtype).to(steps.dtype)

    def groups(self, columns: int) -> int:
        """Number of scales that a row of `columns` weights needs."""
        return 1 if self.group_size is None else -(-columns // self.group_size)

    def bits_per_weight(self, columns: int, scale_bits: int = 32) -> float:
        """Storage per weight, scales included."""
        return self.bits + self.groups(columns) * scale_bits / columns

    def _grouped(self, weight: Tensor) -> Tensor:
        """[rows, columns] -> [rows, groups, size], zero-padded at the end of a row."""
        import torch

        rows, columns = weight.shape
        size = self.group_size or columns
        pad = self.groups(columns) * size - columns
        return torch.nn.functional.pad(weight, (0, pad)).view(rows, self.groups(columns), size)

    def _flat(self, grouped: Tensor, columns: int) -> Tensor:
        return grouped.reshape(grouped.shape[0], -1)[:, :columns]

    def scales(self, weight: Tensor) -> Tensor:
        """Round-to-nearest scales, float32 [rows, groups].

        Where the range is lopsided (qmin = -qmax - 1) the scale takes the sign that maps the largest magnitude to qmin, as
        ONNX Runtime's MatMulNBits quantizer does; the grid's extra value is then used on the side that needs it.
        """
        import torch

        grouped = self._grouped(weight.float())
        index = grouped.abs().argmax(dim=-1, keepdim=True)
        peak = grouped.gather(-1, index).squeeze(-1)
        scale = peak / self.qmin if self.qmin < -self.qmax else peak.abs() / self.qmax
        return self._held(torch.where(scale == 0, torch.ones_like(scale), scale))

    def _held(self, scales: Tensor) -> Tensor:
        """The scales that are stored: of float16 the next larger, which cuts no weight off, at most 0.1 % larger where normal.

        Those beyond its range stay, for engines that hold float32.
        """
        import torch

        if not self.half_scales:
            return scales
        near = scales.half()
        short = (near.float().abs() < scales.abs()).to(torch.int16)
        held = (near.view(torch.int16) + short).view(torch.float16).float()  # one bit more is the next larger magnitude
        return torch.where(held.isfinite(), held, scales)

    def mse_scales(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """Scales of least squared rounding error, float32 [rows, groups].

        A search around `scales`, of either sign where it matters: clipping the few largest weights of a group can cost
        less than the coarser steps that would hold them. importance: what the errors of each column weigh, [columns].
        """
        import torch

        grouped = self._grouped(weight.float())
        weighs = None if importance is None else self._grouped(importance[None].to(grouped))
        start = self.scales(weight)
        best, least = start, torch.full_like(start, torch.inf)
        signs = (1, -1) if self.qmin < -self.qmax else (1,)
        least_clip = 12 if self.bits == 2 else 24  # few levels are better spent on the many than on the largest
        for factor in [sign * step / 40 for sign in signs for step in range(least_clip, 47)]:
            scales = self._held(start * factor)
            rounded = self.round(grouped / scales.unsqueeze(-1)).mul_(scales.unsqueeze(-1))
            error = rounded.sub_(grouped).square_()
            error = (error if weighs is None else error.mul_(weighs)).sum(dim=-1)
            best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
        return best

    def quantize(self, weight: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Round to nearest: (q int8 or float8 [rows, columns], scales float32 [rows, groups])."""
        scales = self.scales(weight) if scales is None else scales
        q = self.round(self._grouped(weight.float()) / scales.unsqueeze(-1))
        return self._flat(q, weight.shape[1]).to(self.dtype), scales

    def dequantize(self, q: Tensor, scales: Tensor) -> Tensor:
        """The float32 weights [rows, columns] that (q, scales) stand for."""
        return self._flat(self._grouped(q.float()) * scales.unsqueeze(-1), q.shape[1])

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """`weight` moved to its nearest grid points, float32."""
        return self.dequantize(*self.quantize(weight))


CHUNK = 1 << 22
"""Weights of a matrix that are worked on at once."""


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """The rows of a matrix in parts, so that what is computed of a large one takes little memory beside it."""
    step = max(1, CHUNK // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


GRIDS = {
    grid.name: grid
    for grid in (
        Grid("int8", bits=8, group_size=None, qmin=-127, qmax=127),
        # One bit of head-room: without VNNI, AVX2 adds pairs of int8 products in int16, which full-range weights overflow.
        Grid("int8-reduced", bits=8, group_size=None, qmin=-63, qmax=63),
        # What llm-compressor and GPTQ round to at 8 bits; held wherever `int8` is.
        Grid("int8-full", bits=8, group_size=None, qmin=-128, qmax=127),
        Grid("int8-g32", bits=8, group_size=32, qmin=-128, qmax=127, half_scales=True),
        Grid("int8-g64", bits=8, group_size=64, qmin=-128, qmax=127),
        Grid("int8-g128", bits=8, group_size=128, qmin=-128, qmax=127),
        Grid("int4", bits=4, group_size=None, qmin=-8, qmax=7),
        Grid("int4-g32", bits=4, group_size=32, qmin=-8, qmax=7, half_scales=True),
        Grid("int4-g64", bits=4, group_size=64, qmin=-8, qmax=7),
        Grid("int4-g128", bits=4, group_size=128, qmin=-8, qmax=7),
        # What ONNX Runtime has fast products for: at 32 weights to a scale they are slower than those of 4 bits.
        Grid("int2-g64", bits=2, group_size=64, qmin=-2, qmax=1),
        Grid("int2-g128", bits=2, group_size=128, qmin=-2, qmax=1),
        Grid("fp8", bits=8, group_size=None, qmin=-448, qmax=448, kind="float"),
    )
}


def grid_named(name: str) -> Grid:
    """The grid of that name; raises RecipeError naming the nearest one."""
    if name not in GRIDS:
        raise RecipeError(f"unknown grid '{name}'; {nearest(name, GRIDS)}")
    return GRIDS[name]
