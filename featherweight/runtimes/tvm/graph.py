"""A transformers model as torch.export hands it on: its products and its attention are operators of ours, with kernels in TVM.

Tokens come with positions and with the places of a cache that they go to; of a decoder only the logits that are asked for are made.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from featherweight.errors import StageError
from featherweight.model.architecture import family_of
from featherweight.model.heads import takes_types
from featherweight.model.matrices import matrices
from featherweight.model.positions import AFTER_PADDING
from featherweight.runtimes.tvm.kernels import LANES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.export import ExportedProgram
    from transformers import PreTrainedModel

    from featherweight.model.quantized_weights import QuantizedWeights

ATTENTION = "featherweight_tvm"
LONGEST = 2**20
HARMLESS = frozenset({"dropout", "output_attentions", "use_cache", "position_ids", "cache_position", "is_causal", "sliding_window"})
"""What modules tell an attention besides, and what is right without it; windows are left out where none is crossed."""


@torch.library.custom_op("featherweight::packed_linear", mutates_args=())
def packed_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor, outputs: int) -> Tensor:
    """x [..., inputs] by weights in panels, see kernels.linear."""
    raise NotImplementedError("it is computed by TVM")


@packed_linear.register_fake
def _(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@torch.library.custom_op("featherweight::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, bounds: Tensor, layer: int, scale: float, causal: bool
) -> Tensor:
    """See kernels.attention; layer: whose part of the cache."""
    raise NotImplementedError("it is computed by TVM")


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, bounds: Tensor, layer: int, scale: float, causal: bool
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


class PackedLinear(nn.Module):
    """A Linear, or GPT-2's Conv1D, whose weights lie in panels of `width` outputs, [panels, inputs, width].

    rows: float32 [outputs, inputs]; or integers, with a scale for each output.
    """

    def __init__(self, rows: Tensor, scales: Tensor | None, bias: Tensor | None, width: int) -> None:
        super().__init__()
        self.outputs, inputs = rows.shape
        panels = -(-self.outputs // width)
        whole = torch.zeros(panels * width, inputs, dtype=rows.dtype)
        whole[: self.outputs] = rows
        self.weight = _constant(whole.view(panels, width, inputs).transpose(1, 2).contiguous())
        self.scales = _constant(self._vector(torch.ones(self.outputs) if scales is None else scales.flatten(), panels * width))
        self.bias = _constant(self._vector(torch.zeros(self.outputs) if bias is None else bias.data, panels * width))

    def _vector(self, values: Tensor, size: int) -> Tensor:
        return torch.cat([values, torch.zeros(size - self.outputs)])

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight, self.scales, self.bias, self.outputs)


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def pack(model: PreTrainedModel, width: int, quantized: QuantizedWeights | None) -> None:
    """Put packed products in the place of every Linear and Conv1D of a model, with the integers of those that are quantized."""
    integers, scales = (quantized.q, quantized.scales) if quantized else ({}, {})
    names = {id(parameter): name for name, parameter, _ in matrices(model) if name in integers}
    for parent in list(model.modules()):
        for place, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | Conv1D):
                rows = child.weight.data.T if isinstance(child, Conv1D) else child.weight.data
                name = names.get(id(child.weight), "")
                setattr(parent, place, PackedLinear(integers.get(name, rows), scales.get(name), child.bias, width))


class OpenCache(Cache):
    """Where an attention finds the cache: a module that asks for what came before is given its new keys and values alone."""

    def __init__(self, keys: Tensor, values: Tensor, bounds: Tensor) -> None:
        self.keys, self.values, self.bounds = keys, values, bounds

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Step(nn.Module):
    """The model for new tokens: ids, types [batch, tokens]; positions [1, tokens]; bounds, keys and values: see kernels.attention.

    kept: of which of them logits are wanted, int64; an encoder answers of all, and is asked for none.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.causal = family_of(model.config) == "causal"

    def forward(
        self, ids: Tensor, types: Tensor, positions: Tensor, kept: Tensor, bounds: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        cache = OpenCache(keys, values, bounds)
        with _attending(self.model, cache, self.causal):
            if self.causal:
                told = {"position_ids": positions, "past_key_values": cache, "use_cache": False, "logits_to_keep": kept}
                return self.model(input_ids=ids, **told).logits
            told = {"token_type_ids": types} if takes_types(self.model.config) else {}
            counts = self.model.config.model_type in AFTER_PADDING  # its positions itself, from what is padding
            return self.model(input_ids=ids, **told, **({} if counts else {"position_ids": positions}))[0]


@contextmanager
def _attending(model: Any, cache: OpenCache, causal: bool) -> Iterator[None]:
    """Every attention of the model by `attend`; the layers of an encoder, which have no number, one after the other."""
    seen: list[nn.Module] = []

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **told: Any) -> tuple[Tensor, None]:
        if mask is not None or (other := [name for name, value in told.items() if _asks(name, value)]):
            raise StageError(f"TVM's attention here knows no {'mask' if mask is not None else other[0]}")
        seen.append(module)
        scale = told.get("scaling") or q.shape[-1] ** -0.5
        return attend(q, k, v, cache.keys, cache.values, cache.bounds, len(seen) - 1, float(scale), causal), None

    AttentionInterface.register(ATTENTION, attention)
    model.set_attn_implementation(ATTENTION)
    yield


def _asks(name: str, value: Any) -> bool:
    return value is not None and name != "scaling" and name not in HARMLESS


@dataclass(frozen=True)
class CacheShape:
    """Of the keys and values of one sequence; layers that are read without a cache share one."""

    layers: int
    groups: int
    width: int
    value_width: int


def cache_shape(model: Any) -> CacheShape:
    """What the attentions of a model are given, found by running it."""
    found: list[tuple[int, int, int]] = []

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **told: Any) -> tuple[Tensor, None]:
        found.append((k.shape[1], k.shape[3], v.shape[3]))
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), None

    AttentionInterface.register(ATTENTION, attention)
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        model(input_ids=torch.full((1, 2), 5))
    if len(set(found)) != 1:
        raise StageError(f"the layers' keys and values have {len(set(found))} shapes, and TVM's cache here has one")
    return CacheShape(len(found), *found[0])


def exported(model: Any, shape: CacheShape) -> ExportedProgram:
    """The graph of `Step` for any number of sequences, tokens and places of the cache."""
    ids = torch.full((2, 3), 5)
    layers, places = shape.layers, 2 * LANES
    keys = torch.zeros(layers, 2, shape.groups, shape.width, places)
    values = torch.zeros(layers, 2, shape.groups, places, shape.value_width)
    given = (ids, torch.zeros_like(ids), torch.arange(3)[None], torch.tensor([1, 2]), torch.zeros(2).long(), keys, values)
    batch, kept, cached = Dim("batch"), Dim("kept"), Dim("places")
    tokens = Dim("tokens", max=getattr(model.config, "max_position_embeddings", None) or LONGEST)
    both = {0: batch, 1: tokens}
    shapes = (both, both, {1: tokens}, {0: kept}, {0: batch}, {1: batch, 4: cached}, {1: batch, 3: cached})
    with torch.no_grad():
        return torch.export.export(Step(model), given, dynamic_shapes=shapes, strict=False)
