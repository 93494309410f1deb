"""The checkpoint that a method is to change, as far as it is known: in the plan, and once it lies there."""

from __future__ import annotations

from dataclasses import dataclass

from featherweight.model.architecture import LAYOUTS, model_types
from featherweight.model.facts import CONV1D, CheckpointFacts
from featherweight.spec import Task


@dataclass(frozen=True)
class Parent:
    """What a method is asked about before any weight is read.

    model_type: as the checkpoint's config names it; None before that is known, when only what no model for `task` can is refused.
    sparse: whether it has zeros that are to stay. facts: what else its folder tells; None before that is known.
    """

    task: Task
    model_type: str | None = None
    sparse: bool = False
    facts: CheckpointFacts | None = None

    @classmethod
    def of(cls, facts: CheckpointFacts) -> Parent:
        """The checkpoint that tells this of itself."""
        return cls(facts.task, facts.model_type, facts.sparse, facts)

    @property
    def sized(self) -> CheckpointFacts | None:
        """Its facts where the sizes that they name are its own."""
        return self.facts if self.facts and self.facts.sized else None

    @property
    def model_types(self) -> tuple[str, ...]:
        """What its model type may be."""
        return (self.model_type,) if self.model_type else model_types(self.task)


def linear_refusal(what: str, parent: Parent) -> str | None:
    """Why `what` does not work on `parent`'s layers, in one line; None where it does, or where its type is not known."""
    if parent.model_type not in CONV1D:
        return None
    return (
        f"{what} works on Linear layers, and those of a '{parent.model_type}' model are Conv1D; take method: rtn, without smoothing"
    )


FEW = 0.1
"""The share of a model's weights that may stay in float where it is called by the grid of the others."""


def experts_refusal(facts: CheckpointFacts | None) -> str | None:
    """Why a mixture of experts is not moved to a grid, in one line; None where there are few of their weights, or none."""
    if facts is None or facts.experts <= FEW:
        return None
    return (
        f"{facts.experts:.0%} of the weights of this {facts.model_type} model are its experts', which nothing moves to a grid "
        "here: it would be quantized in name only; serve it in float32, without a quantize stage"
    )


def walking_refusal(method: str, parent: Parent, traced: bool = True) -> str | None:
    """Why `method`, which goes through the blocks of a model one by one, cannot go through `parent`'s; None where it can.

    traced: decoders are, whatever their type.
    """
    if (traced and parent.task == "text-generation") or any(name in LAYOUTS for name in parent.model_types):
        return None
    known = ", ".join(model_types(parent.task))
    return f"{parent.task} + {method}: where a '{parent.model_type}' model keeps its blocks is not known here; known: {known}"
