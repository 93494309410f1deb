"""Quantized weights as a served folder stores them: integers at their own width, scales, and all other tensors once.

`packed.safetensors` holds `<parameter>.q` (int8 [rows, columns]; on 4-bit grids uint8 [rows, ceil(columns / 2)], offset binary,
low half first), `<parameter>.scales` (float32 [rows, groups]) and the float tensors under their own names. Its metadata names
the method, and the grid and columns of each quantized parameter. A tied matrix stands under the embedding's name only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.errors import IntegrityError
from featherweight.grid import grid_named
from featherweight.model.quantized_weights import QuantizedWeights, heads_by_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILE = "packed.safetensors"
KEY = "featherweight"
HALF = 8
"""What is added to a 4-bit integer, so that it lies in 0 to 15."""


@dataclass(frozen=True)
class Packed:
    """Quantized parameters, and the float tensors beside them."""

    quantized: QuantizedWeights
    rest: Mapping[str, Tensor]

    def write(self, folder: Path) -> None:
        """Write `packed.safetensors` into `folder`."""
        from safetensors.torch import save_file

        quantized = self.quantized
        tensors = {name: tensor.contiguous() for name, tensor in self.rest.items()}
        for name, grid in quantized.grids.items():
            tensors[f"{name}.q"] = pack_nibbles(quantized.q[name]) if grid.bits == 4 else quantized.q[name].contiguous()
            tensors[f"{name}.scales"] = quantized.scales[name].float().contiguous()
        shapes = {name: [grid.name, quantized.q[name].shape[1]] for name, grid in sorted(quantized.grids.items())}
        told = {"method": quantized.method, "grids": shapes}
        # Only where the names do not tell: what could be written before is written in the same bytes as before.
        told |= {"heads": sorted(quantized.heads)} if quantized.heads & shapes.keys() != heads_by_name(shapes) else {}
        # One key: safetensors writes several in an order of its own each time, and the same weights must give the same bytes.
        save_file(tensors, folder / FILE, {KEY: json.dumps(told)})

    def to(self, where: torch.device) -> Packed:
        """The same on another device."""

        def moved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(where) for name, tensor in tensors.items()}

        quantized = self.quantized
        return Packed(replace(quantized, q=moved(quantized.q), scales=moved(quantized.scales)), moved(self.rest))

    @classmethod
    def read(cls, folder: Path) -> Packed:
        """What `write` wrote; raises IntegrityError where it is missing or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(folder / FILE, framework="pt") as file:
                told = json.loads(file.metadata()[KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            heads = frozenset(told["heads"]) if "heads" in told else heads_by_name(told["grids"])
            quantized = QuantizedWeights({}, {}, {}, told["method"], heads)
            for name, (grid, columns) in told["grids"].items():
                quantized.grids[name] = grid_named(grid)
                q = tensors.pop(f"{name}.q")
                quantized.q[name] = unpack_nibbles(q, columns) if quantized.grids[name].bits == 4 else q
                quantized.scales[name] = tensors.pop(f"{name}.scales")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{folder / FILE} is damaged ({error}); export the variant again") from error
        return cls(quantized, tensors)


def pack_nibbles(q: Tensor) -> Tensor:
    """int8 [rows, columns] in -8 to 7 -> uint8 [rows, ceil(columns / 2)], the first of two columns in the low half."""
    import torch

    halves = torch.nn.functional.pad((q + HALF).to(torch.uint8), (0, q.shape[1] % 2))
    return (halves[:, 0::2] | halves[:, 1::2] << 4).contiguous()


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """The int8 [rows, columns] that `pack_nibbles` packed."""
    import torch

    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    return halves[:, :columns].to(torch.int8) - HALF
