"""vLLM's server, as far as it can be told without starting one."""

from __future__ import annotations

from pathlib import Path

import pytest

from featherweight.runtimes.vllm.server import _cache_bytes

BLOCK, PAIR = 128, 2 * 4


@pytest.mark.parametrize(("kind", "heads", "width"), [("gpt2", 4, 2048), ("bloom", 4, 2048), ("llama", 2, 2048)])
def test_the_cache_has_room_for_the_batch_whatever_a_config_calls_its_heads(
    kind: str, heads: int, width: int, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    sizes = {"gpt2": {"n_embd": heads * width, "n_head": heads}, "bloom": {"hidden_size": heads * width, "n_head": heads}}
    grouped = {"hidden_size": 4 * width, "num_attention_heads": 4, "num_key_value_heads": heads, "num_hidden_layers": 3}
    told = {"n_layer": 3} | sizes[kind] if kind in sizes else grouped
    AutoConfig.for_model(kind, **told).save_pretrained(tmp_path)
    assert _cache_bytes(tmp_path, 256, 8) == 2 * (8 * 2 + 2) * BLOCK * PAIR * 3 * heads * width
