"""What the model builder of onnxruntime-genai 0.18 does beside building, left out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def weights_of(model: PreTrainedModel | None) -> Iterator[None]:
    """It loads all weights once more, in the type that they are stored in, and adds Gemma's 1 to the norms in bfloat16.

    It gets them of `model`, where one is given: in float32, or from their files.
    """
    base = sys.modules["builders.base"].Model
    load = base.load_weights
    if model is not None:
        base.load_weights = lambda *_: model
    try:
        yield
    finally:
        base.load_weights = load


def without_commit() -> None:
    """It writes the commit of whatever repository its environment lies in into the graph: the same weights, other bytes."""
    sys.modules["builders.base"].Model.get_genai_commit = lambda: None


def silent() -> None:
    """The builder prints its every step; to redirect stdout would also swallow what other threads print."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "builders" or name == "onnxruntime_genai.models.builder":
            vars(module)["print"] = lambda *_, **__: None
            if hasattr(module, "tqdm"):
                vars(module)["tqdm"] = partial(module.tqdm, disable=True)
