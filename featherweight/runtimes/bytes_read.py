"""What an engine reads from memory to generate for one sequence: the weights as it holds them, and its cache.

Every tensor of the served files has a role: read for each token (`step`), once for a generation (`once`: an encoder, and the
keys and values of its output), or one row of it for each token (`row`: tables of embeddings and positions). A tied embedding is
the head as well, and read whole.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from featherweight.measure.roofline import BytesRead, cache_position_bytes
from featherweight.model.architecture import auto_class, family_of
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.store.served_folder import Serving

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Role = Literal["row", "once", "step"]
ROLES: tuple[Role, ...] = ("row", "once", "step")
"""The later, the more is read; a tensor with several names has the last of their roles."""
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
CROSS_KEYS_AND_VALUES = re.compile(r"(encoder_attn\.[kv]_proj|EncDecAttention\.[kv])$")
EXPERT = re.compile(r"\.experts\.")


@dataclass(frozen=True)
class HeldTensor:
    """A tensor as the engine holds it while it serves. rows: its first dimension, 0 of a scalar. share: of it that is read."""

    role: Role
    size_bytes: float
    rows: int
    share: float = 1.0


def bytes_read(served: Path) -> BytesRead | None:
    """What serving that folder reads, from main memory or a GPU's; None where memory is not the roof.

    That is so for an encoder, which reads its weights once for all tokens of a text, and for weights in a format that is not
    known here, or without the configuration beside them.
    """
    from transformers import AutoConfig

    serving = Serving.read(served)
    if not (served / "config.json").is_file():
        return None
    config = AutoConfig.from_pretrained(served, local_files_only=True)
    runtime = RUNTIMES[serving.engine]
    if family_of(config) == "encoder":
        return None
    tensors = [one for one in runtime.held_tensors(served / serving.weights, serving, config) if one.rows]
    if not tensors:
        return None
    weights = {role: sum(one.size_bytes * one.share for one in tensors if one.role == role) for role in ("step", "once")}
    rows = sum(one.size_bytes / one.rows for one in tensors if one.role == "row")
    return _with_cache(weights["step"] + rows, weights["once"], config, _cache_width(serving))


def _with_cache(step: float, once: float, config: PreTrainedConfig, width: float) -> BytesRead:
    """The weights, with keys and values `width` bytes wide."""
    config = config.get_text_config()
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    layers = next(value for name in names if (value := getattr(config, name, None)))
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    position = cache_position_bytes(layers, kv_heads, head_dim, width)
    return BytesRead(step, once, position, position if config.is_encoder_decoder else 0.0)


def _cache_width(serving: Serving) -> int:
    """Bytes of one number of the cache."""
    return 1 if serving.options.get("kv_cache_dtype") == "fp8" else float_width(serving)


def float_width(serving: Serving) -> int:
    """Bytes of the floats that an engine computes in, which float weights become as they are loaded."""
    options = serving.options
    computed = options.get("dtype") or options.get("compute_type", "")
    return 2 if computed.endswith(("float16", "bfloat16")) or "bitsandbytes" in options else 4


class Roles:
    """Roles of the parameters of a transformers model, by the path of their module."""

    def __init__(self, config: PreTrainedConfig) -> None:
        from torch import nn

        model = _skeleton(config)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self.head = id(head.weight) if head is not None else None
        self.ends = {self.head, id(embedding.weight)}
        self.tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        parameters = model.named_parameters(remove_duplicate=False)
        self.weights = {name.removesuffix(".weight"): id(one) for name, one in parameters if name.endswith(".weight")}
        inside = set(model.get_encoder().modules()) if config.is_encoder_decoder else set()
        self.encoder = {name for name, module in model.named_modules() if module in inside}
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        self.active = config.num_experts_per_tok / experts if experts else 1.0

    def is_vocabulary(self, path: str) -> bool:
        """Whether a module is the token embedding or the output head."""
        return self.weights.get(path) in self.ends

    def of(self, path: str) -> tuple[Role, float]:
        """(role, share that is read) of what belongs to a module."""
        identity = self.weights.get(path)
        if identity is not None and identity == self.head:
            return "step", 1.0
        if identity in self.tables:
            return "row", 1.0
        if path in self.encoder or CROSS_KEYS_AND_VALUES.search(path):
            return "once", 1.0
        return "step", self.active if EXPERT.search(f"{path}.") else 1.0


def _skeleton(config: PreTrainedConfig) -> Any:
    """The model without memory, its tied parameters tied."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config)
    model.tie_weights()
    return model


def checkpoint_tensors(folder: Path, serving: Serving, config: PreTrainedConfig) -> Iterator[HeldTensor]:
    """transformers' own files: floats become those that the engine computes in as they are loaded, integers stay."""
    width, roles = float_width(serving), Roles(config)
    for name, shape, dtype, size in headers(folder):
        role, share = roles.of(name.rpartition(".")[0])
        held = math.prod(shape) * width if dtype in FLOATS else size
        yield HeldTensor(role, held, shape[0] if shape else 0, share)


def headers(folder: Path) -> Iterator[tuple[str, list[int], str, int]]:
    """(name, shape, dtype, bytes) of every tensor of the safetensors files of a folder, the data unread."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            tree = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, one in tree.items():
            if name != "__metadata__":
                yield name, one["shape"], one["dtype"], one["data_offsets"][1] - one["data_offsets"][0]
