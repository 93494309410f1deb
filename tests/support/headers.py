"""A checkpoint of which nothing but the headers tells anything."""

from __future__ import annotations

import json
import struct
from pathlib import Path

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96, "max_position_embeddings": 128}
TOKENIZER = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
"""Of one word."""


def safetensors(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """A file of zeros."""
    header, end = {}, 0
    for name, (rows, columns) in shapes.items():
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [end, end := end + 4 * rows * columns]}
    told = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(told)) + told + bytes(end))


def headers_alone(folder: Path) -> Path:
    """A Llama of which nothing but the headers tells anything."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    body = {f"model.layers.{i}.mlp.{name}_proj.weight": (96, 64) for i in (0, 1) for name in ("up", "gate")}
    safetensors(folder / "model.safetensors", {"model.embed_tokens.weight": (64, 64), **body})
    return folder
