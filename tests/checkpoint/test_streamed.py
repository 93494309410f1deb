"""Models whose weights stay in their files compute what models in memory compute, and hold no weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening, streamed

IDS = torch.arange(40).view(2, 20) % 30


def saved(kind: str, tiny_checkpoint: Path, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """A random model in shards."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny_checkpoint, folder)
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    config = AutoConfig.for_model(kind, **{**sizes, **options})
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
        ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 2}),
        ("gpt2", {}),
        ("gpt_neox", {"tie_word_embeddings": False}),
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 8}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
    ],
)
def test_it_computes_the_same(kind: str, options: Any, dtype: torch.dtype, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = saved(kind, tiny_checkpoint, tmp_path / kind, dtype, **options)
    model, whole = streamed.streamed_model(folder), opening.load_model(folder).eval()
    assert model is not None
    ids = IDS.to(whole.device)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    shapes = {name: (weight.shape, weight.dtype) for name, weight in whole.named_parameters()}
    assert {name: (weight.shape, weight.dtype) for name, weight in model.named_parameters()} == shapes
    assert opening.parameters(model) == opening.parameters(whole)
    if dtype == torch.bfloat16:
        fed = [weight for weight in model.parameters() if weight.ndim < 3]  # a convolution's are read from outside of it
        assert all(weight.isnan().all() and weight.untyped_storage().nbytes() == 4 for weight in fed)
    elif ids.device.type == "cpu":
        assert all(torch.equal(weight, whole.get_parameter(name)) for name, weight in model.named_parameters())


def test_a_change_is_what_it_computes_with(tiny_checkpoint: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = streamed.streamed_model(tiny_checkpoint, lambda one, tensor: tensor * 3 if one == name else tensor)
    whole = opening.load_model(tiny_checkpoint).eval()
    whole.get_parameter(name).data *= 3
    assert model is not None
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS.to(model.device)).logits, whole(input_ids=IDS.to(whole.device)).logits)


def test_an_error_inside_leaves_no_weights_behind(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = saved("qwen2", tiny_checkpoint, tmp_path / "qwen2", num_key_value_heads=2)
    model = streamed.streamed_model(folder)
    assert model is not None
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]], device=model.device))
    assert all(weight.untyped_storage().nbytes() == 4 for weight in model.parameters())


def test_what_the_files_hold_otherwise_is_loaded(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's experts are one parameter of the model and many tensors of the files."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    folder = saved("mixtral", tiny_checkpoint, tmp_path / "mixtral", **experts)
    assert not streamed.is_large(folder)
    monkeypatch.setattr(streamed, "LARGE", 1)
    assert streamed.is_large(folder)
    assert streamed.streamed_model(folder) is None
    model = streamed.open_model(folder)
    assert not any(weight.isnan().any() for weight in model.parameters())
