"""The weights of compiled graphs: in one file of safetensors, each once, and handed to the graphs when they are loaded.

Inductor keeps beside the weights that a graph reads those that it packed anew, and which nothing reads any more.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Views = dict[str, dict[str, Any] | None]
"""Of each constant of a graph, by its name: which stored numbers it shows (key, shape, stride); None for what nothing reads."""
DECLARED = re.compile(r"^.*(?:auto& (\w+) = constants_->at\((\d+)\)|constants_info_\[\d+\]\..*).*$", re.MULTILINE)
NAMED = re.compile(r'constants_info_\[(\d+)\]\.original_fqn = "(.+)";')


def unread(wrapper: str) -> set[str]:
    """The constants that a graph's generated C++ declares, and reads nowhere."""
    names = dict(NAMED.findall(wrapper))
    rest = set(re.findall(r"\w+", DECLARED.sub("", wrapper)))
    return {names[index] for variable, index in DECLARED.findall(wrapper) if variable and variable not in rest}


def stored(tensors: Mapping[str, Tensor], unread: set[str], store: dict[str, Tensor]) -> Views:
    """Put the numbers that are read into `store`, those of equal bytes once; returns where each constant's are."""
    return {name: None if name in unread else _stored(tensor, store) for name, tensor in tensors.items()}


def _stored(tensor: Tensor, store: dict[str, Tensor]) -> dict[str, Any]:
    import torch

    tensor = tensor.detach()
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((span,), (1,)).clone()
    key = hashlib.sha256(f"{flat.dtype}".encode() + flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:32]
    store.setdefault(key, flat)
    return {"key": key, "shape": list(tensor.shape), "stride": list(tensor.stride())}


def read(file: Path) -> dict[str, Tensor]:
    """What `stored` put into the file, mapped and not read."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dictionary


def viewed(views: Views, store: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The constants of a graph; an empty tensor stands for what nothing reads."""
    import torch

    return {
        name: torch.empty(0) if view is None else store[view["key"]].as_strided(view["shape"], view["stride"])
        for name, view in views.items()
    }
