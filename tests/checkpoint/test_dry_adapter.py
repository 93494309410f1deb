"""An adapter of which something is lost, or that its base cannot take, is told before the base's weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BeftConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from featherweight.checkpoint import dry_adapter
from featherweight.checkpoint.facts import read_facts
from featherweight.checkpoint.opening import load_config, load_model
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError
from featherweight.model.architecture import task_of
from tasks.load import load
from tests.support.families import family_checkpoint

IDS = torch.tensor([[1, 7, 20, 8, 8, 29, 4]])
QUERIES = {"target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place, made = tmp_path_factory.mktemp("bases"), dict[str, Path]()

    def base(kind: str) -> Path:
        return made.setdefault(kind, made.get(kind) or family_checkpoint(kind, place / kind))

    return base


def answers(model: Any) -> torch.Tensor:
    asked = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**asked).logits
    return found


def saved(base: Path, folder: Path, settings: Any) -> torch.Tensor:
    """Write an adapter whose every trained number was drawn; what peft answers with it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = get_peft_model(load_model(base), settings)
        for weight in model.parameters():
            weight.data += 0.05 * torch.randn_like(weight) * weight.requires_grad
    model.peft_config["default"].base_model_name_or_path = str(base)
    found = answers(model)
    model.save_pretrained(folder)
    return found


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "init_lora_weights": False} | QUERIES | options)


def lost(folder: Path, pattern: str | None, **settings: Any) -> None:
    """Take the tensors of that name out of an adapter, and have its settings say so."""
    if pattern:
        tensors = load_file(folder / "adapter_model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}
        assert len(kept) < len(tensors)
        save_file(kept, folder / "adapter_model.safetensors")
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | settings))


def spec(adapter: Path, base: Path) -> LoadSpec:
    return LoadSpec(source=str(adapter), task=task_of(load_config(base)))


@pytest.mark.parametrize(
    ("kind", "options", "pattern", "settings", "reason"),
    [
        ("qwen2", {"bias": "all"}, r"bias$", {}, r"k_proj\.bias is missing \(and 5 more\), and \S+ says that biases .*bias: none"),
        ("qwen2", {"bias": "lora_only"}, r"1\.self_attn\.v_proj.*bias$", {}, r"v_proj\.base_layer\.bias is missing, and"),
        ("llama", {"modules_to_save": ["lm_head"]}, "lm_head", {}, r"lm_head\.weight is missing, which adapter_config.json says"),
        ("llama", {"use_dora": True}, "magnitude", {}, r"lora_magnitude_vector\S* is missing, and its base has a place"),
        ("llama", {"use_dora": True}, None, {"use_dora": False}, r"lora_magnitude_vector\S* has no place in its base"),
        ("llama", {"layers_to_transform": [1]}, None, {"layers_to_transform": None}, r"layers\.0\S+ is missing, and its base"),
        ("llama", {}, r"1\S+v_proj\.lora_B", {}, r"v_proj\.lora_B\S+ is missing, and its base has a place for it;"),
        ("llama", {}, None, {"rank_pattern": {"q_proj": 2}}, r"\(.*size mismatch.*\); set checkpoint.base"),
        ("llama", {}, None, {"target_modules": ["nothing"]}, r"\(Target modules .*nothing.* not found .*\); set checkpoint.base"),
        ("llama", {"trainable_token_indices": [3]}, None, {"trainable_token_indices": [999]}, "has the token 999, and its base"),
        ("llama", {"trainable_token_indices": [3]}, "token_adapter", {}, r"trainable_tokens_delta is missing, which"),
        ("bart", {}, r"encoder\.layers\.0", {}, r"encoder\.layers\.0\S+ is missing, and its base has a place"),
        ("marian", {"target_modules": ["q_proj", "shared"]}, None, {}, "trained the embedding or the head alone, .* this marian"),
    ],
)  # fmt: skip
def test_what_an_adapter_has_lost_or_its_base_has_no_place_for_is_told_in_the_plan(
    kind: str, options: Any, pattern: str | None, settings: Any, reason: str, bases: Any, tmp_path: Path
) -> None:
    """Lost biases were the base's own, without a word; Marian's `shared` was merged into what its encoder reads by, too."""
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    saved(bases(kind), adapter, lora(**options))
    lost(adapter, pattern, **settings)
    with pytest.raises(CheckpointError, match=reason) as error:
        read_facts(spec(adapter, bases(kind)))
    assert "\n" not in str(error.value)
    out.mkdir()
    with pytest.raises(CheckpointError, match=reason):
        load(spec(adapter, bases(kind)), out=out)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bart", {"modules_to_save": ["lm_head"]}),
        ("bert", {"target_modules": ["query", "word_embeddings"]}),
        ("bert", {"target_modules": ["query"], "modules_to_save": ["cls"]}),
        ("qwen2", {"bias": "all", "init_lora_weights": "pissa"}),
        ("llama", {"trainable_token_indices": [3, 5], "use_dora": True}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
    ],
)
def test_what_peft_takes_is_planned_and_merged(kind: str, options: Any, bases: Any, tmp_path: Path) -> None:
    """The head of an encoder-decoder, and an encoder's embedding, were refused with "copy it again"."""
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    right = saved(bases(kind), adapter, lora(**options))
    read_facts(spec(adapter, bases(kind)))
    out.mkdir()
    load(spec(adapter, bases(kind)), out=out)
    torch.testing.assert_close(answers(load_model(out)), right, rtol=0, atol=1e-5)
    assert (right - answers(load_model(bases(kind)))).abs().max() > 0.05


def test_a_kind_that_cannot_be_merged_into_its_base_is_told_in_the_plan(bases: Any, tmp_path: Path) -> None:
    saved(bases("llama"), tmp_path / "adapter", BeftConfig(**QUERIES))
    with pytest.raises(CheckpointError, match=r"into its base \(Base layer has no bias.*\); .* give the base alone"):
        read_facts(spec(tmp_path / "adapter", bases("llama")))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "o_proj.lora_A.weight has the shape none in its file"),
        ({"layers_to_transform": [0]}, r"asks for none"),
        ({"target_modules": ["nothing"]}, "Target modules"),
    ],
)
def test_an_adapter_that_is_to_be_kept_is_held_to_its_settings_in_the_plan(
    settings: Any, reason: str, bases: Any, tmp_path: Path
) -> None:
    saved(bases("llama"), tmp_path / "adapter", lora())
    kept = LoadSpec(source=str(bases("llama")), adapters={"fr": str(tmp_path / "adapter")})
    read_facts(kept)
    lost(tmp_path / "adapter", None, **settings)
    with pytest.raises(CheckpointError, match=rf"checkpoint\.adapters\.fr: .*{reason}"):
        read_facts(kept)


def test_where_torch_is_not_here_another_python_is_asked(bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    adapter = tmp_path / "adapter"
    saved(bases("qwen2"), adapter, lora(bias="all"))
    lost(adapter, "bias$")
    config = json.loads((bases("qwen2") / "config.json").read_text())

    def answered(module: str, arguments: list[str], key: str) -> dict[str, Any]:
        asked.append([module, *arguments[1:], key])
        return dry_adapter.judged(Path(arguments[0]), Path(arguments[1]), None)

    with monkeypatch.context() as patched:
        patched.setattr(dry_adapter.asking, "asked", answered)
        patched.setattr(dry_adapter, "sys", type("Without", (), {"modules": {}}))
        for _ in range(2):
            with pytest.raises(CheckpointError, match="says that biases were trained"):
                dry_adapter.require_mergeable(adapter, config)
        lost(adapter, None, bias="none")
        dry_adapter.require_mergeable(adapter, config)
    assert asked[0] == asked[1] != asked[2], "a change of the adapter asks anew"
    assert asked[0][:2] == [dry_adapter.__name__, str(adapter)]
