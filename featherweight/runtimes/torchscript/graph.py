"""A transformers model as `torch.jit.trace` records it: whole texts, and of a decoder single steps, behind a static cache.

A trace keeps what Python decided for the text that it saw: lengths, branches, which experts were asked. So each graph is traced
by two inputs of other sizes and tokens; it is right for all texts only where both are the same.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from difflib import unified_diff
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from featherweight.errors import StageError
from featherweight.runtimes.torch_aoti.graph import Decoder, Encoder, Step

if TYPE_CHECKING:
    from featherweight.runtimes.torch_aoti.graph import LayerShape

Inputs = Mapping[str, tuple[Any, ...]]
"""What each graph is given, by its name."""
FIRST, OTHER = (2, 3, 64, 0), (3, 7, 128, 1)
"""(sequences, tokens, places of the cache, seed) of the two inputs."""
MANGLED = re.compile(r"___torch_mangle_\d+\.")
"""What PyTorch puts into the names of modules that it traces once more."""


class Reading(nn.Module):
    """Of what answers texts at once the one graph, `read`: see torch_aoti.graph.Encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = Encoder(model)

    def read(self, ids: Tensor, types: Tensor, lengths: Tensor) -> Tensor:
        """The answers at every position."""
        found: Tensor = self.encoder(ids, types, lengths)
        return found


class Writing(nn.Module):
    """Of a decoder both graphs, over the same weights: see torch_aoti.graph.Decoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.stepping = Decoder(model), Step(model)

    def read(self, ids: Tensor, places: Tensor, kept: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """The logits of the new tokens `kept`."""
        found: Tensor = self.decoder(ids, places, kept, keys, values)
        return found

    def step(self, ids: Tensor, places: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Those of one new token of each sequence."""
        found: Tensor = self.stepping(ids, places, keys, values)
        return found


def traced(model: Any, layers: list[LayerShape] | None) -> Any:
    """The module of all graphs, frozen: `read`, and of a decoder (which has `layers`) `step`.

    Raises StageError where a graph is of its text alone.
    """
    module = (Reading(model) if layers is None else Writing(model)).eval()
    vocabulary = model.config.get_text_config().vocab_size
    first, other = (_trace(module, _inputs(layers, vocabulary, *sizes)) for sizes in (FIRST, OTHER))
    names = ["read"] if layers is None else ["read", "step"]
    for name in names:
        _require_same(name, _told(first, name), _told(other, name))
    return torch.jit.freeze(first, preserved_attrs=names)


def _inputs(layers: list[LayerShape] | None, vocabulary: int, batch: int, tokens: int, places: int, seed: int) -> Inputs:
    ids = torch.randint(min(4, vocabulary - 1), vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    if layers is None:
        return {"read": (ids, torch.zeros_like(ids), torch.arange(tokens - batch + 1, tokens + 1))}
    cache = [
        [torch.zeros(batch, one.groups, places, size) for one, size in zip(layers, sizes, strict=True)]
        for sizes in ([one.width for one in layers], [one.value_width for one in layers])
    ]
    read = (ids, torch.arange(tokens), torch.arange(1, tokens), *cache)
    return {"read": read, "step": (ids[:, :1], torch.tensor([tokens]), *cache)}


def _trace(module: nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is deprecated, and of each number that Python reads
        return torch.jit.trace_module(module, dict(inputs), check_trace=False)


def _told(module: Any, name: str) -> list[str]:
    """The graph in lines, without its sizes and where in the sources they come from."""
    graph = getattr(module, name).graph.copy()
    torch._C._jit_pass_inline(graph)
    torch._C._jit_pass_erase_shape_information(graph)
    return MANGLED.sub("", torch._C._jit_pass_canonicalize(graph).str(False)).splitlines()


def _require_same(name: str, first: list[str], other: list[str]) -> None:
    if first == other:
        return
    changed = next(
        line for line in unified_diff(first, other, n=0, lineterm="") if line[0] in "-+" and line[:3] not in ("---", "+++")
    )
    raise StageError(f"the {name} graph is another for another text: {' '.join(changed[1:].split())[:120]}")
