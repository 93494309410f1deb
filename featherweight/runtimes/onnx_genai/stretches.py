"""A large weight of a graph that is being built, which is in memory as float32 for a stretch of its rows at a time only."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

import onnx_ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from featherweight.store.mapped import give_back

if TYPE_CHECKING:
    from torch import Tensor

BYTES = 1 << 26
"""Of a stretch in float32."""


class InStretches(onnx_ir.LazyTensor):
    """`tensor`, of whatever float and strides, as one of float32; the pages of a file that it lies in are given back."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        kind, shape = onnx_ir.DataType.FLOAT, onnx_ir.Shape(tensor.shape)
        super().__init__(lambda: TorchTensor(tensor.float(), name=name), dtype=kind, shape=shape, name=name)
        self.tensor = tensor

    def tofile(self, file: BinaryIO) -> None:
        """Write its rows one behind the other."""
        rows = max(1, BYTES // (4 * self.tensor[0].numel()))
        for stretch in self.tensor.detach().split(rows):
            file.write(stretch.to(torch.float32).contiguous().numpy().data)
            give_back(self.tensor)
