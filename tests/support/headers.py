"""A checkpoint of which nothing but the headers tells anything."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96, "max_position_embeddings": 128}
TOKENIZER = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
"""Of one word."""


def safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * prod(shape)]}
    told = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(told)) + told + bytes(end))


def of_a_llama(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a tied Llama's tensors whose heads are as many as its keys', and as wide as these make its states."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    layer: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
    layer |= {f"mlp.{name}_proj.weight": (inner, hidden) for name in ("up", "gate")} | {"mlp.down_proj.weight": (hidden, inner)}
    layer |= {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    body = {f"model.layers.{i}.{name}": shape for i in range(config["num_hidden_layers"]) for name, shape in layer.items()}
    return {"model.embed_tokens.weight": (config["vocab_size"], hidden), **body, "model.norm.weight": (hidden,)}


def headers_alone(folder: Path) -> Path:
    """A Llama of which nothing but the headers tells anything."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    safetensors(folder / "model.safetensors", of_a_llama(CONFIG))
    return folder
