"""Pruning methods, one file each: `prune(given) -> Pruned`. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from featherweight.pruning import attention, depth, sparse, structured, width
from featherweight.pruning.interface import Pruned, PruningInput

METHODS: dict[str, Callable[[PruningInput], Pruned]] = {
    "structured": structured.prune,
    "depth": depth.prune,
    "width": width.prune,
    "attention": attention.prune,
    "sparse": sparse.prune,
}
