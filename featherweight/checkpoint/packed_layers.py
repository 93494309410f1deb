"""What a quantized checkpoint's weights are once they are read: integers (or float8), scales and zero points, or floats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from featherweight.grid import GRIDS, Grid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """A weight matrix: `q` int8 or float8 [rows, columns] about zero, `scales` float32 and `zeros` of q's type, [rows, groups].

    group: columns per scale; where `index` (int64 [columns]) is given it names each column's group instead.
    """

    bits: int
    q: Tensor
    scales: Tensor
    group: int
    zeros: Tensor | None = None
    index: Tensor | None = None

    def columns_group(self) -> Tensor:
        """The group of each column, int64 [columns]."""
        import torch

        return torch.arange(self.q.shape[1]) // self.group if self.index is None else self.index.long()

    def obstacle(self) -> str | None:
        """Why no grid holds it: 'zero points' that are not zero, or columns in an 'act-order'; None where one may."""
        if self.zeros is not None and bool(self.zeros.any()):
            return "zero points"
        if self.index is not None and not self.index.long().equal(Layer.columns_group(_in_order(self))):
            return "act-order"
        return None

    def weight(self) -> Tensor:
        """The float32 weight [rows, columns]. Exact: numbers of 8 bits times scales of 16 fit into a float32."""
        group = self.columns_group()
        q = self.q.float() if self.zeros is None else self.q.float() - self.zeros.float()[:, group]
        return q * self.scales[:, group]


def _in_order(layer: Layer) -> Layer:
    return Layer(layer.bits, layer.q, layer.scales, layer.group)


@dataclass
class Found:
    """Parameters of a quantized checkpoint by name: layers, and weights of scales that no layer has (FP8 in blocks), as floats."""

    layers: dict[str, Layer] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)

    def grids(self) -> dict[str, Grid]:
        """The grid of every layer that lies on one; layers of the same bits and groups share it, as engines fuse some."""
        extremes: dict[Kind, tuple[float, float]] = {}
        fitting = {name: layer for name, layer in self.layers.items() if layer.obstacle() is None}
        for layer in fitting.values():
            low, high = extremes.get(_kind(layer), (0, 0))
            extremes[_kind(layer)] = (min(low, layer.q.float().min().item()), max(high, layer.q.float().max().item()))
        chosen = {kind: grid_of(kind, *span) for kind, span in extremes.items()}
        return {name: grid for name, layer in fitting.items() if (grid := chosen[_kind(layer)]) is not None}


Kind = tuple[str, int, int | None]
"""'int' or 'float', bits, and the group that shares a scale (None: a row), as `Grid` has them."""


def _kind(layer: Layer) -> Kind:
    kind = "float" if layer.q.is_floating_point() else "int"
    return kind, layer.bits, None if layer.scales.shape[1] == 1 else layer.group


def grid_of(kind: Kind, low: float, high: float) -> Grid | None:
    """The first grid that holds such numbers."""
    grids = (grid for grid in GRIDS.values() if (grid.kind, grid.bits, grid.group_size) == kind)
    return next((grid for grid in grids if grid.qmin <= low and high <= grid.qmax), None)


STEP, HALF = 1.0, 0.5


def one_off(layers: Iterable[Layer]) -> int:
    """-1 or 1 where all layers lie a step below or above zero, as they do where zero points are stored less one and read as they
    are, or the other way; 0 where they do not.

    Zero points that are one number in all layers are 0 about zero. Of others the mean tells, which in a layer of a model is near
    zero.
    """
    found = [_placed(layer) for layer in layers if layer.zeros is not None]
    alike = {zero for zero, _ in found}
    if len(alike) == 1 and (zero := alike.pop()) is not None:
        return -int(zero) if abs(zero) == STEP else 0
    for side in (-1, 1):
        if found and all(HALF < side * mean < STEP + HALF for _, mean in found):
            return side
    return 0


def _placed(layer: Layer) -> tuple[float | None, float]:
    """The zero point of all groups of a layer, where it is one, and the mean of its numbers about theirs."""
    import torch

    zeros = layer.zeros
    assert zeros is not None
    columns = torch.bincount(layer.columns_group(), minlength=zeros.shape[1]).double()
    means = zeros.double().mean(0)
    same = float(zeros.flatten()[0]) if bool((zeros == zeros.flatten()[0]).all()) else None
    return same, float(layer.q.double().mean() - (means * columns).sum() / columns.sum())


PACKED = re.compile(r"\.(weight|qweight|weight_packed)$")


def without_scale(header: Mapping[str, Mapping[str, Any]], ending: re.Pattern[str]) -> str | None:
    """The first packed weight in the headers of safetensors that has no scale of that ending; None where there is none."""
    scaled = {ending.sub("", name) for name in header if ending.search(name)}
    packed = (name for name, entry in header.items() if PACKED.search(name) and is_packed(entry))
    return next((name for name in packed if PACKED.sub("", name) not in scaled), None)


def is_packed(entry: Mapping[str, Any]) -> bool:
    """Whether a tensor is a matrix of numbers that stand for others: of integers, or of floats of 8 bits."""
    kind, shape = str(entry.get("dtype")), entry.get("shape") or ()
    return (kind.startswith("F8") or kind[:1] in ("I", "U")) and len(shape) > 1


def modules(tensors: Iterable[str], ending: str) -> list[str]:
    """The names of the modules that have a tensor of that ending, in order."""
    return [name.removesuffix(ending) for name in sorted(tensors) if name.endswith(ending)]


def whole(layer: Layer, module: str) -> Layer:
    """The layer; raises ValueError where there are not as many scales as its columns ask for: the settings are not its own.

    So it does for zero points of other groups or rows than the scales, which torch would wrap or leave over.
    """
    index, (rows, columns) = layer.columns_group(), layer.q.shape
    if int(index.min()) < 0:
        raise ValueError(f"{module}.g_idx has the group {int(index.min())}")
    if len(index) != columns or int(index.max()) + 1 != layer.scales.shape[1] or len(layer.scales) != rows:
        told = f"{layer.bits} bits in groups of {layer.group}"
        raise ValueError(f"{module} has scales {list(layer.scales.T.shape)}, which {told} of {columns} columns do not have")
    if layer.zeros is not None and layer.zeros.shape != layer.scales.shape:
        raise ValueError(f"{module} has zero points {list(layer.zeros.T.shape)} and scales {list(layer.scales.T.shape)}")
    return layer
