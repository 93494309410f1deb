"""Quantized weights beside a checkpoint: the integers and scales that a quantize stage chose.

A quantized checkpoint is a plain Hugging Face folder whose float weights already lie on their grids, plus two files:
`quantized.safetensors` with `<parameter>.q` (int8 or float8 [rows, columns]) and `<parameter>.scales` (float32 [rows, groups]),
and `quantization.json`, which names the grid of each parameter. `Grid.dequantize(q, scales)` equals the float weight bit
for bit, so an exporter packs the integers as they are and rounds nothing a second time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.errors import CheckpointError
from featherweight.grid import GRIDS, Grid, row_chunks
from featherweight.store.mapped import give_back, seal
from featherweight.store.tensor_file import write_tensors

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "quantized.safetensors"
DESCRIPTION = "quantization.json"
FLOAT_BITS = 32
HEADS_BEFORE = (
    *("embed_tokens.weight", "lm_head.weight", "shared.weight"),
    *("word_embeddings.weight", "predictions.decoder.weight", "lm_head.decoder.weight", "vocab_projector.weight"),
)
"""How the names of embedding and head end in folders that were written before they named them (November 2026)."""


def heads_by_name(names: Iterable[str]) -> frozenset[str]:
    """The embedding and the head among the names in a folder that does not say which they are."""
    return frozenset(name for name in names if name.endswith(HEADS_BEFORE))


def dequantized(grid: Grid, q: Tensor, scales: Tensor) -> Tensor:
    """The float32 weight [rows, columns] that integers and scales stand for, with little memory beside it."""
    import torch

    weight = torch.empty(q.shape, device=q.device)
    for rows in row_chunks(*q.shape):
        weight[rows] = grid.dequantize(q[rows], scales[rows])
    return weight


@dataclass(frozen=True)
class QuantizedWeights:
    """Grid, integers (int8, or float8 numbers, [rows, columns]) and scales (float32 [rows, groups]) by parameter name.

    A row is an output feature, or a token, also where the parameter holds it in a column (GPT-2's Conv1D). A tied output head
    stands under the embedding's name only. heads: the names of embedding and head among the model's parameters.
    """

    grids: dict[str, Grid]
    q: dict[str, Tensor]
    scales: dict[str, Tensor]
    method: str
    heads: frozenset[str] = frozenset()

    @property
    def body(self) -> dict[str, Grid]:
        """The grids of the weights in the blocks, by name."""
        return {name: grid for name, grid in self.grids.items() if name not in self.heads}

    @property
    def grid(self) -> str | None:
        """Name of the grid of the blocks' weights; of mixed ones the coarsest, which most of them lie on."""
        return min(self.body.values(), key=lambda grid: grid.bits).name if self.body else None

    @property
    def head(self) -> str | None:
        """Name of the grid of the embedding and the output head; None where they are in float."""
        return next((grid.name for name, grid in self.grids.items() if name in self.heads), None)

    def dequantize(self, name: str) -> Tensor:
        """The float32 weight [rows, columns] of one parameter."""
        made = dequantized(self.grids[name], self.q[name], self.scales[name])
        give_back(self.q[name])
        return made

    def seal(self) -> None:
        """Let nobody write to what was `read`, so that its pages can be given back once they were used (store/mapped.py)."""
        for tensor in list(self.q.values())[:1]:  # all lie in one mapping
            seal(tensor)

    def bits_per_weight(self, in_float: int = 0) -> float:
        """Storage per weight, scales included, over all of a model that holds `in_float` weights of 32 bits beside these."""
        sizes = {name: q.numel() for name, q in self.q.items()}
        bits = sum(self.grids[name].bits_per_weight(q.shape[1]) * sizes[name] for name, q in self.q.items())
        return (bits + FLOAT_BITS * in_float) / (sum(sizes.values()) + in_float)

    def write(self, folder: Path) -> None:
        """Write both files into a checkpoint folder."""
        tensors = {f"{name}.q": q for name, q in self.q.items()}
        tensors |= {f"{name}.scales": scales for name, scales in self.scales.items()}
        kinds = {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()}
        write_tensors(folder / WEIGHTS, kinds, tensors.items(), metadata={})
        description = {
            "method": self.method,
            "grid": self.grid,
            "head": self.head,
            "heads": sorted(self.heads & self.grids.keys()),
            "grids": {name: grid.name for name, grid in sorted(self.grids.items())},
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> QuantizedWeights | None:
        """What `write` wrote; None for a checkpoint that is not quantized. Raises CheckpointError on damage."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not (folder / DESCRIPTION).exists():
            return None
        try:
            description = json.loads((folder / DESCRIPTION).read_text())
            grids = {name: GRIDS[grid] for name, grid in description["grids"].items()}
            tensors = load_file(folder / WEIGHTS)
            q = {name: tensors[f"{name}.q"] for name in grids}
            scales = {name: tensors[f"{name}.scales"] for name in grids}
            heads = frozenset(description["heads"]) if "heads" in description else heads_by_name(grids)
            return cls(grids, q, scales, description["method"], heads)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} holds damaged quantized weights ({error}); quantize it again") from error
