"""A whole pruning method as another package would bring it: the last layers go."""

from __future__ import annotations

from typing import Literal

from featherweight.checkpoint import opening
from featherweight.errors import RecipeError
from featherweight.model import surgery
from featherweight.model.parent import Parent
from featherweight.pruning.interface import Pruned, Pruner, PruningInput
from featherweight.pruning.spec import PruneSpec
from featherweight.spec import Positive


class TailSpec(PruneSpec):
    """Without the last `layers` layers."""

    method: Literal["tail"] = "tail"
    layers: Positive = 1


def refusal(spec: TailSpec, parent: Parent) -> str | None:
    """An encoder, for no better reason than to show it."""
    return f"{parent.task} + tail: cuts no encoder" if parent.task == "fill-mask" else None


def operations(spec: TailSpec, parameters: int) -> float:
    """Nothing is looked at."""
    return 0.0


def prune(given: PruningInput[TailSpec]) -> Pruned:
    """Keep the first layers. Raises RecipeError where none would stay."""
    kept = given.config.num_hidden_layers - given.spec.layers
    if kept < 1:
        raise RecipeError(f"prune.layers {given.spec.layers}: the model has no more; give fewer")
    before, loss = opening.parameters(given.model), given.loss()
    return Pruned(surgery.copy_layers(given.model, {"decoder": tuple(range(kept))}), before, loss, {"layers": kept})


TAIL = Pruner(TailSpec, prune, libraries=("outside-pruner",), refusal=refusal, operations=operations)
