"""What libraries import and nothing here asks for, left out: seconds of every process that opens a checkpoint."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

ASSISTED_GENERATION = "transformers.generation.candidate_generator"


class WithoutScikitLearn(importlib.abc.MetaPathFinder):
    """Lets transformers' assisted generation find no scikit-learn.

    transformers imports it, and pandas with it, wherever a model can generate, for the curve by which assisted generation
    tunes the confidence of its draft; without it that confidence stays as it was set.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Nothing, ever; before the module in question is imported, change what it is going to be told."""
        if fullname == ASSISTED_GENERATION:
            sys.modules["transformers.utils"].is_sklearn_available = lambda: False  # type: ignore[attr-defined]
        return None


def install() -> None:
    """Leave it out of every import that follows in this process."""
    if not any(isinstance(finder, WithoutScikitLearn) for finder in sys.meta_path):
        sys.meta_path.insert(0, WithoutScikitLearn())
