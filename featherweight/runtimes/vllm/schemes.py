"""The formats of quantized weights that vLLM serves, as compressed-tensors names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from featherweight.grid import Grid
from featherweight.runtimes.spec import ComputeType


@dataclass(frozen=True)
class Scheme:
    """A compressed-tensors format. grouped: whether it holds a scale per group of weights, or one per row only.

    activations: 'int8' and 'fp8' are rounded per token at run time; 'float' stays in the engine's float type.
    """

    name: str
    format: str
    bits: int
    kind: Literal["int", "float"]
    activations: Literal["int8", "fp8", "float"]
    grouped: bool

    def holds(self, grid: Grid) -> bool:
        """Whether weights on `grid` are packed exactly."""
        return (grid.bits, grid.kind) == (self.bits, self.kind) and (self.grouped or grid.group_size is None)

    @property
    def weights(self) -> str:
        """What it holds, in words."""
        unit = "8-bit float" if self.kind == "float" else f"{self.bits}-bit integer"
        return f"{unit} weights with one scale per row" + (" or group" if self.grouped else "")


SCHEMES: dict[ComputeType, Scheme] = {
    "int8": Scheme("W8A8", "int-quantized", 8, "int", "int8", grouped=False),
    "w8a16": Scheme("W8A16", "pack-quantized", 8, "int", "float", grouped=True),
    "w4a16": Scheme("W4A16", "pack-quantized", 4, "int", "float", grouped=True),
    "fp8": Scheme("FP8", "float-quantized", 8, "float", "fp8", grouped=False),
}
