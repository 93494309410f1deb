"""Sparse checkpoints: single weights set to zero inside full matrices, kept at zero by what comes after, and what that is worth.

A sparse checkpoint is a plain Hugging Face folder whose weights hold the zeros, plus `sparsity.json`, which names the pruned
matrices, the pattern and the share of zeros in each. The mask itself is not stored: it is where those matrices are zero.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, TypeAdapter

from featherweight.errors import CheckpointError, StageError, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "sparsity.json"
UNSTRUCTURED = "unstructured"
SEMI_STRUCTURED = "2:4"


@dataclass(frozen=True)
class Sparsity:
    """How a checkpoint was made sparse. `shares` holds the share of zeros of each pruned matrix, by parameter name.

    pattern: 'N:M' where at most N of M neighbours in a row are not zero, or 'unstructured'.
    """

    criterion: str
    pattern: Annotated[str, Field(pattern=rf"^({UNSTRUCTURED}|[1-9]\d*:[1-9]\d*)$")]
    shares: Annotated[Mapping[str, Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]

    def write(self, folder: Path) -> None:
        """Write `sparsity.json` into a checkpoint folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Sparsity | None:
        """What `write` wrote; None for a checkpoint that is not sparse. Raises CheckpointError on damage."""
        path = folder / FILE
        if not path.exists():
            return None
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({one_line(error)}); prune the checkpoint again") from error

    def of_layers(self, model: nn.Module) -> Sparsity | None:
        """How a `model` made of some of the layers is sparse, which have other numbers there; None where it has no zeros."""
        kinds = {_kind(name) for name in self.shares}
        weights = {name: weight.detach() for name, weight in model.named_parameters() if _kind(name) in kinds}
        shares = {name: (weight == 0).float().mean().item() for name, weight in weights.items() if follows(weight, self.pattern)}
        shares = {name: share for name, share in shares.items() if share}
        return replace(self, shares=shares) if shares else None


@dataclass(frozen=True)
class Zeros:
    """The mask of a model: True where a weight is to stay zero, by parameter name. Empty for a model that is not sparse."""

    masks: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, sparsity: Sparsity | None) -> Zeros:
        """The zeros of the pruned matrices of `model` as they are now; one byte per weight."""
        parameters = dict(model.named_parameters())
        names = sparsity.shares if sparsity else ()
        missing = [name for name in names if name not in parameters]
        if missing:
            raise CheckpointError(f"{FILE} names {missing[0]}, which the model does not have; prune the checkpoint again")
        return cls({name: parameters[name].detach() == 0 for name in names})

    def shares(self) -> dict[str, float]:
        """The share of zeros of each pruned matrix."""
        return {name: mask.float().mean().item() for name, mask in self.masks.items()}

    def metrics(self) -> dict[str, float]:
        """`zero_share`, the share of zeros in the pruned matrices together; nothing for a model that is not sparse."""
        weights = sum(mask.numel() for mask in self.masks.values())
        return {"zero_share": sum(int(mask.sum()) for mask in self.masks.values()) / weights} if weights else {}

    @contextmanager
    def held(self, model: nn.Module) -> Iterator[None]:
        """Meanwhile no gradient reaches the zeros: neither AdamW, whose moments stay zero there, nor its decay moves them.

        Frozen weights, as below adapters, need no holding; what is merged into them later is undone by `restore`.
        """
        parameters = dict(model.named_parameters())
        trained = {name: mask for name, mask in self.masks.items() if name in parameters and parameters[name].requires_grad}
        with ExitStack() as hooks:
            for name, mask in trained.items():
                hooks.callback(parameters[name].register_hook(_without(mask)).remove)
            yield

    def require_kept(self, model: nn.Module, what: str) -> None:
        """Raise StageError where `model`, which `what` made, is not zero wherever it is to be."""
        parameters = dict(model.named_parameters())
        for name, mask in self.masks.items():
            filled = int((parameters[name][mask.to(parameters[name].device)] != 0).sum())
            if filled:
                raise StageError(f"{what} filled {filled} of the {int(mask.sum())} zeros of {name}; take another method")

    def restore(self, model: nn.Module) -> None:
        """Set the masked weights of `model` to zero."""
        parameters = dict(model.named_parameters())
        for name, mask in self.masks.items():
            parameters[name].data.masked_fill_(mask.to(parameters[name].device), 0.0)


def _kind(name: str) -> str:
    """A parameter's name with the number of its layer left open."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _without(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(mask.to(gradient.device), 0.0)


def follows(weight: Tensor, pattern: str) -> bool:
    """Whether a matrix [rows, columns] keeps to a pattern: at most N of every M neighbours in a row are not zero."""
    if pattern == UNSTRUCTURED:
        return True
    kept, of = (int(part) for part in pattern.split(":"))
    return weight.shape[-1] % of == 0 and bool(((weight.reshape(-1, of) != 0).sum(1) <= kept).all())
