"""What the model builder of onnxruntime-genai 0.18 does beside building, left out."""

from __future__ import annotations

import sys
from functools import partial


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
