"""Pruning methods, one file each: `prune(job) -> Pruned`. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from featherweight.pruning import attention, depth, sparse, structured, width
from featherweight.pruning.job import Job, Pruned

METHODS: dict[str, Callable[[Job], Pruned]] = {
    "structured": structured.prune,
    "depth": depth.prune,
    "width": width.prune,
    "attention": attention.prune,
    "sparse": sparse.prune,
}
