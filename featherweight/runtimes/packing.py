"""Finding quantized rows again in an engine's own layout.

Converters fuse, reorder and rename matrices, but they never alter the values of a row (one output feature, or one token of an
embedding). So a row's bytes tell where it came from, whatever the converter calls it, and which integers and scales stand for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

from featherweight.errors import StageError
from featherweight.grid import Grid, row_chunks
from featherweight.model.matrices import matrices, rows_of
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.store.mapped import give_back

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


Place = tuple[str, int]


@dataclass(frozen=True)
class Packable:
    """A matrix as an engine stores it: rows of quantized weights by their places, gathered when they are read."""

    grid: Grid
    shape: tuple[int, int]
    read: Callable[[], tuple[Tensor, Tensor]]
    """Integers, int8 [rows, columns], and scales, float32 [rows, groups]."""
    names: frozenset[str] = frozenset()
    """The parameters that its rows come from."""

    @cached_property
    def digest(self) -> tuple[bytes, bytes]:
        """Of the integers and of the scales: matrices of the same numbers have the same."""
        q, scales = self.read()
        return hashlib.blake2b(q.numpy().data).digest(), hashlib.blake2b(scales.numpy().data).digest()


@dataclass
class QuantizedRows:
    """The quantized weights of a model, to be found by the bytes of its float rows."""

    quantized: QuantizedWeights
    places: dict[Grid, dict[bytes, Place]] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: PreTrainedModel, quantized: QuantizedWeights) -> QuantizedRows:
        """Index the rows of `model` as they are now (before or after they were moved to their grids)."""
        rows = cls(quantized, unused=set(quantized.q))
        for name, parameter, transposed in matrices(model):
            if name in quantized.q:
                places = rows.places.setdefault(quantized.grids[name], {})
                for index, digest in enumerate(_digests(rows_of(parameter, transposed))):
                    places.setdefault(digest, (name, index))
            give_back(parameter)
        return rows

    def find(self, matrix: Tensor) -> Packable | None:
        """What stands for a float matrix [rows, columns] made of the model's rows in any order; None where it is not quantized.

        Raises StageError where only some of its rows are quantized, or not all on one grid.
        """
        digests = list(_digests(matrix))
        give_back(matrix)
        known = [sum(digest in places for digest in digests) for places in self.places.values()]
        for (grid, places), count in zip(self.places.items(), known, strict=True):
            if count == len(digests):
                found = [places[digest] for digest in digests]
                names, columns = frozenset(name for name, _ in found), matrix.shape[1]
                self.unused -= names
                return Packable(grid, (len(found), columns), partial(self._gather, grid, found, columns), names)
        if any(known):
            raise StageError(
                f"a matrix of {len(digests)} rows in the engine's layout mixes grids, or quantized with float rows; "
                "the engine stores one grid per matrix"
            )
        return None

    def require_all_used(self, engine: str) -> None:
        """Raise StageError if some quantized weight was never found: it would be served in float, or not at all."""
        if self.unused:
            raise StageError(f"{engine}'s converter has no place for the quantized weight {min(self.unused)}")

    def _gather(self, grid: Grid, places: list[Place], columns: int) -> tuple[Tensor, Tensor]:
        import torch

        names = dict.fromkeys(name for name, _ in places)
        q = torch.empty(len(places), columns, dtype=torch.int8)
        scales = torch.empty(len(places), grid.groups(columns))
        for name in names:
            here = torch.tensor([row for row, place in enumerate(places) if place[0] == name])
            there = torch.tensor([place[1] for place in places if place[0] == name])
            q[here], scales[here] = self.quantized.q[name].cpu()[there], self.quantized.scales[name].cpu()[there]
            give_back(self.quantized.q[name])
        return q, scales


def _digests(matrix: Tensor) -> Iterator[bytes]:
    """A digest of the bytes of each row, as float32."""
    for rows in row_chunks(*matrix.shape):
        values = matrix[rows].detach().float().cpu().contiguous().numpy()
        yield from (hashlib.blake2b(row, digest_size=16).digest() for row in values)
