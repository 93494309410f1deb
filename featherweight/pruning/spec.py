"""What a recipe says of pruning, whatever the method."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from featherweight.errors import RecipeError, refused
from featherweight.model.parent import Parent
from featherweight.pruning.catalog import DEFAULT, PRUNERS
from featherweight.spec import ModelSize, NamedSpec, Positive, SequenceLength
from featherweight.training.spec import FinetuneSpec

Criterion = Literal["vectorize", "param_first", "param_second", "param_mix", "l1", "l2", "random"]
"""LLM-Pruner's measures of how much a unit matters, see importance.py."""


class PruneSpec(NamedSpec):
    """A smaller or sparser model, judged on `samples` blocks of calibration text, then recovery training.

    The keys that every method reads; a method adds its own in its file.
    """

    named_by = "method"

    method: str = DEFAULT
    samples: Positive = 10
    sequence: SequenceLength = 64
    finetune: FinetuneSpec | None = FinetuneSpec()

    @classmethod
    def kind(cls, name: str | None) -> type[PruneSpec]:
        try:
            return PRUNERS[name or DEFAULT].spec
        except RecipeError as error:
            raise ValueError(str(error)) from error

    @classmethod
    def kinds(cls) -> Collection[type[PruneSpec]]:
        return [PRUNERS[name].spec for name in PRUNERS]

    @property
    def parts(self) -> tuple[str, ...]:
        return (PRUNERS.reference(self.method),)

    @property
    def uneven(self) -> bool:
        """Whether layers of one stack may end with different widths."""
        return False

    @property
    def sparse(self) -> bool:
        """Whether it leaves zeros that are to stay."""
        return PRUNERS[self.method].sparse

    @property
    def reads_text(self) -> bool:
        """Whether it reads what the recipe trains on, beside the calibration text."""
        return PRUNERS[self.method].reads_text

    @property
    def other_tokens(self) -> bool:
        """Whether it leaves another tokenizer."""
        return PRUNERS[self.method].other_tokens

    def refusal(self, parent: Parent) -> str | None:
        """Why this cannot be done to `parent`, in one line; None where it can."""
        pruner = PRUNERS[self.method]
        return pruner.refusal(self, parent) or (refused(pruner.check, self, parent.sized) if parent.sized else None)

    def operations(self, size: ModelSize) -> float:
        return PRUNERS[self.method].operations(self, size.parameters)
