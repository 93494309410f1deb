"""A transformers model as torch.export hands it to Inductor: whole texts, and of a decoder single steps, behind a static cache.

transformers' own static cache is a module that its step changes, which AOTInductor cannot compile; here keys and values are the
graph's inputs, one tensor for each layer, which it writes into in place.
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

from featherweight.errors import StageError
from featherweight.model.heads import forwarded, states, takes_types
from featherweight.model.positions import context_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.export import ExportedProgram
    from transformers import PreTrainedConfig

ATTENTION = "featherweight_aoti"
LONGEST = 2**20
PLACES = 64
HARMLESS = frozenset(
    {"dropout", "output_attentions", "output_router_logits", "use_cache", "position_ids", "cache_position", "is_causal"}
)
"""What modules tell an attention besides, and what is right without it."""
SINKS = "s_aux"
"""A logit of each head for what is at no place, as gpt-oss has it."""
KNOWN = frozenset({"scaling", "softcap", "sliding_window", SINKS})


@dataclass(frozen=True)
class LayerShape:
    """Of the keys and values of one place of a layer."""

    groups: int
    width: int
    value_width: int


class NoCache(Cache):
    """A module that asks for what came before is given its new keys and values alone; the attention knows the rest."""

    def __init__(self) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    @property
    def is_initialized(self) -> bool:
        return False


class Decoder(nn.Module):
    """The logits of the new tokens `kept` of ids [batch, tokens], which go to `places` of the cache.

    keys, values: of each layer [batch, groups, places, width]; changed in place.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, places: Tensor, kept: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        with attending(self.model, Attention(places, keys, values, self.model.config)):
            return _logits(self.model, ids, places, kept)


class Step(Decoder):
    """The same for one new token of each sequence, whose logits are always wanted."""

    def forward(self, ids: Tensor, places: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(ids, places, torch.zeros_like(places), keys, values)


def _logits(model: Any, ids: Tensor, places: Tensor, kept: Tensor) -> Tensor:
    told = {"position_ids": places[None], "past_key_values": NoCache(), "use_cache": False, "logits_to_keep": kept}
    logits: Tensor = model(input_ids=ids, **told).logits
    return logits


class Encoder(nn.Module):
    """What is said at every position of ids [batch, tokens] by what answers texts at once; lengths: of each without padding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, types: Tensor, lengths: Tensor) -> Tensor:
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        told = {"token_type_ids": types} if takes_types(self.model.config) else {}
        return states(self.model.config, forwarded(self.model, {"input_ids": ids, "attention_mask": mask, **told}))


class Attention:
    """Attention of new tokens to a cache that they are written into first; layer after layer, as they are called."""

    def __init__(self, places: Tensor, keys: list[Tensor], values: list[Tensor], config: PreTrainedConfig) -> None:
        self.places, self.keys, self.values, self.layer = places, keys, values, 0
        self.config: Any = config.get_text_config()

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **told: Any) -> tuple[Tensor, None]:
        _refuse_unknown(attention_mask, told)
        keys, values = self.keys[self.layer], self.values[self.layer]
        seen = self._seen(keys.shape[2], told)
        self.layer += 1
        keys.index_copy_(2, self.places, k)
        values.index_copy_(2, self.places, v)
        scale = told.get("scaling") or q.shape[-1] ** -0.5
        return _attend(q, keys, values, seen, float(scale), told.get("softcap"), told.get(SINKS)), None

    def _seen(self, places: int, told: Mapping[str, Any]) -> Tensor:
        """Which places each new token looks at, bool [tokens, places]. Some modules tell the window to the mask alone."""
        every, own = torch.arange(places)[None], self.places[:, None]
        kind, seen = self._kind(), every <= own
        if kind == "chunked_attention":
            return seen & (every // self.config.attention_chunk_size == own // self.config.attention_chunk_size)
        window = told.get("sliding_window", self.config.sliding_window if kind == "sliding_attention" else None)
        return seen & (every > own - window) if window else seen

    def _kind(self) -> str:
        """Of the layer, by transformers' names; all are alike where the configuration names none."""
        if kinds := getattr(self.config, "layer_types", None):
            return str(kinds[self.layer])
        return "sliding_attention" if getattr(self.config, "sliding_window", None) else "full_attention"


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, cap: float | None, sinks: Tensor | None = None
) -> Tensor:
    """[batch, heads, tokens, width] -> [batch, tokens, heads, width]; the heads of a group are rows of one product.

    Rows lie as PyTorch's kernel leaves its answer, before the groups: so does torch.export believe that the answer lies.
    """
    batch, heads, tokens, width = q.shape
    groups, shared = keys.shape[1], heads // keys.shape[1]
    bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")).repeat(shared, 1)
    rows = q.view(batch, groups, shared, tokens, width).permute(0, 2, 3, 1, 4).contiguous()
    rows = rows.view(batch, shared * tokens, groups, width).transpose(1, 2)
    if cap or sinks is not None:
        scores = rows @ keys.transpose(2, 3) * scale
        scores = (torch.tanh(scores / cap) * cap if cap else scores) + bias
        found = _shares(scores, sinks, tokens) @ values
    else:
        found = nn.functional.scaled_dot_product_attention(rows, keys, values, attn_mask=bias, scale=scale)
    found = found.transpose(1, 2).contiguous().view(batch, shared, tokens, groups, values.shape[3])
    return found.permute(0, 2, 3, 1, 4).contiguous().view(batch, tokens, heads, values.shape[3])


def _shares(scores: Tensor, sinks: Tensor | None, tokens: int) -> Tensor:
    """Softmax of scores [batch, groups, shared * tokens, places], a part of which the sink of each head takes where it has one."""
    if sinks is None:
        return scores.softmax(-1)
    batch, groups = scores.shape[:2]
    others = sinks.view(1, groups, -1, 1, 1).expand(batch, -1, -1, tokens, -1).reshape(batch, groups, -1, 1)
    return torch.cat([scores, others], dim=-1).softmax(-1)[..., :-1]


def _refuse_unknown(mask: Any, told: dict[str, Any]) -> None:
    other = [name for name, value in told.items() if value is not None and name not in (*HARMLESS, *KNOWN)]
    if mask is not None or other:
        raise StageError(f"the attention that is put in its place here knows no {'mask' if mask is not None else other[0]}")


@contextmanager
def attending(model: Any, attention: Any) -> Iterator[None]:
    """Every attention of the model by `attention`."""
    AttentionInterface.register(ATTENTION, attention)
    model.set_attn_implementation(ATTENTION)
    yield


def layer_shapes(model: Any) -> list[LayerShape]:
    """What the attentions of a decoder are given, found by running it. Raises StageError where none was asked."""
    found: list[LayerShape] = []

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **told: Any) -> tuple[Tensor, None]:
        found.append(LayerShape(k.shape[1], k.shape[3], v.shape[3]))
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), None

    with attending(model, attention), torch.no_grad():
        model(input_ids=torch.full((1, 2), 5), use_cache=False)
    if not found:
        raise StageError(f"the attention of {model.config.model_type} is its own, and no other can be put in its place")
    return found


def programs(model: Any, layers: list[LayerShape] | None) -> dict[str, ExportedProgram]:
    """The graphs, by name: `read` for whole texts, and of a decoder (which has `layers`) `step` for one token of each sequence."""
    tokens = Dim("tokens", min=1, max=min(context_tokens(model.config), LONGEST))
    if layers is None:
        ids, both = torch.full((2, 3), 5), {0: BATCH, 1: tokens}
        return {"read": _exported(Encoder(model), (ids, torch.zeros_like(ids), torch.tensor([2, 3])), (both, both, {0: BATCH}))}
    kept, cached = Dim("kept", min=1), [{0: BATCH, 2: Dim("places", min=2, max=LONGEST)}] * len(layers)
    cache = [[torch.zeros(2, one.groups, PLACES, size) for one, size in _sizes(layers, name)] for name in ("width", "value_width")]
    whole = (torch.full((2, 3), 5), torch.arange(3), torch.tensor([1, 2]), *cache)
    one = (torch.full((2, 1), 5), torch.tensor([3]), *cache)
    return {
        "read": _exported(Decoder(model), whole, ({0: BATCH, 1: tokens}, {0: tokens}, {0: kept}, cached, cached)),
        "step": _exported(Step(model), one, ({0: BATCH}, None, cached, cached)),
    }


BATCH = Dim("batch", min=1)


def _sizes(layers: list[LayerShape], name: str) -> list[tuple[LayerShape, int]]:
    return [(layer, getattr(layer, name)) for layer in layers]


def _exported(module: nn.Module, given: tuple[Any, ...], shapes: tuple[Any, ...]) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, given, dynamic_shapes=shapes, strict=False)
