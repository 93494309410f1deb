"""Zeros of a checkpoint that is loaded: what its sparsity.json says is verified, and what nobody has said is found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint import opening
from featherweight.checkpoint.files import Listing, find_weights
from featherweight.checkpoint.tensors import stream_tensors
from featherweight.errors import CheckpointError
from featherweight.model.architecture import LAYOUTS
from featherweight.model.blockwise import matrices
from featherweight.model.sparsity import FILE, SEMI_STRUCTURED, UNSTRUCTURED, Sparsity, follows
from featherweight.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

HALF = 0.49
"""The share from which a checkpoint counts as sparse: a half, less what rounding down leaves in small matrices."""
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Count:
    """Of one matrix: its zeros, its weights, and whether it keeps to the pattern that was asked about."""

    zeros: int
    weights: int
    patterned: bool

    @classmethod
    def of(cls, weight: Tensor, pattern: str) -> Count:
        """`weight` [rows, columns] counted."""
        return cls(weight.numel() - int(weight.count_nonzero()), weight.numel(), follows(weight, pattern))

    @property
    def share(self) -> float:
        """Share of zeros."""
        return self.zeros / self.weights


def take_stock(folder: Path, where: str, *, search: bool, progress: Progress) -> dict[str, float]:
    """Leave a `sparsity.json` that is true in a loaded checkpoint folder; returns `zero_share`, or nothing for a dense one.

    search: whether to look for zeros that no sparsity.json tells of. Raises CheckpointError, which names `where`, for one
    that is damaged or does not belong to the weights.
    """
    told = Sparsity.read(folder)
    if told is not None:
        found = _counted(folder, told.shares, told.pattern)
        _verify(told, found, where)
    else:
        found = _found(folder) if search else {}
        if not found:
            return {}
        told = Sparsity("found at load", _pattern(found), {name: count.share for name, count in found.items()})
        told.write(folder)
    share = _share(found)
    progress.note(f"{share * 100:.0f} % of the weights of {len(found)} matrices are zero ({told.pattern}), and will be kept so")
    return {"zero_share": share}


def _verify(told: Sparsity, found: dict[str, Count], where: str) -> None:
    remedy = f"copy the checkpoint again, or remove {FILE} to take it as dense"
    for name, share in told.shares.items():
        if name not in found:
            raise CheckpointError(f"{where}: {FILE} names {name}, which the checkpoint does not have; {remedy}")
        if found[name].share < share - TOLERANCE:
            shares = f"{share * 100:.1f} % of {name} are zero, and {found[name].share * 100:.1f} % are"
            raise CheckpointError(f"{where}: {FILE} says that {shares}; {remedy}")
        if not found[name].patterned:
            raise CheckpointError(f"{where}: {FILE} says that {name} is {told.pattern}, and it is not; {remedy}")


def _found(folder: Path) -> dict[str, Count]:
    """The matrices with zeros in the blocks of a checkpoint that was pruned elsewhere; none where less than half are zero."""
    if opening.model_type(folder) not in LAYOUTS:
        return {}
    names = [f"{name}.weight" for name in matrices(opening.load_config(folder))]
    counts = _counted(folder, names, SEMI_STRUCTURED)
    return {name: count for name, count in counts.items() if count.zeros} if counts and _share(counts) >= HALF else {}


def _pattern(found: dict[str, Count]) -> str:
    return SEMI_STRUCTURED if all(count.patterned for count in found.values()) else UNSTRUCTURED


def _share(counts: dict[str, Count]) -> float:
    return sum(count.zeros for count in counts.values()) / sum(count.weights for count in counts.values())


def _counted(folder: Path, names: Iterable[str], pattern: str) -> dict[str, Count]:
    """What there is of the named matrices, read one by one."""
    wanted, weights = set(names), find_weights(Listing.of(folder))
    return {name: Count.of(tensor, pattern) for _, name, tensor in stream_tensors(folder, weights) if name in wanted}
