"""Adapters that are kept beside a checkpoint: copied with it, computed with by peft, and refused where they are more than LoRA."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint.facts import read_facts
from featherweight.checkpoint.fetching import source_fingerprint
from featherweight.checkpoint.kept_adapters import adapted, beside, kept_adapters
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError
from featherweight.runtimes.parity import load_reference
from tasks.load import load
from tests.support.families import family_checkpoint, lora_folder

IDS = torch.tensor([[1, 7, 20, 8, 8, 29, 4]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_checkpoint("llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("lora")
    return {"fr": lora_folder(base, place / "french"), "de.1": lora_folder(base, place / "german", seed=2, use_rslora=True)}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(load_reference(base), str(adapter)).eval())


def test_they_lie_beside_a_checkpoint_that_is_still_its_own(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    load(LoadSpec(source=str(base), adapters={name: str(path) for name, path in adapters.items()}), out=tmp_path)
    kept = kept_adapters(tmp_path)
    assert sorted(kept) == ["de.1", "fr"]
    model, own = load_reference(tmp_path), logits(load_reference(base))
    assert torch.equal(logits(model), own)
    for name, path in adapters.items():
        with adapted(model, kept[name]) as together:
            assert torch.equal(logits(together), by_peft(base, path))
            assert not torch.allclose(logits(together), own, atol=1e-2)
        assert torch.equal(logits(model), own), "and nothing of it is left"
    choose = beside(model, kept)
    for chosen, right in [*((name, by_peft(base, path)) for name, path in adapters.items()), (None, own)]:
        choose(chosen)
        assert torch.allclose(logits(model), right, atol=1e-6), chosen


def test_another_adapter_is_another_checkpoint(base: Path, adapters: dict[str, Path]) -> None:
    found = {source_fingerprint(LoadSpec(source=str(base), adapters={"a": str(path)})) for path in adapters.values()}
    assert len({*found, source_fingerprint(LoadSpec(source=str(base)))}) == 3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "it says use_dora, which no engine takes beside a model; merge it instead: checkpoint.source is"),
        ({"bias": "all"}, "it has trained biases"),
        ({"init_lora_weights": "pissa"}, "it takes from the base's weights what it began with (init_lora_weights: pissa)"),
        ({"peft_type": "IA3"}, "adapters of type IA3 are not kept beside a model, LoRA's alone are; merge it instead"),
    ],
)
def test_what_is_more_than_two_factors_is_refused_in_the_plan(
    settings: dict[str, Any], told: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    for file in adapters["fr"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(CheckpointError, match=r"checkpoint\.adapters\.fr: ") as refused:
        read_facts(LoadSpec(source=str(base), adapters={"fr": str(tmp_path)}))
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_checkpoint_is_no_adapter(base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json; give the folder that peft saved"):
        read_facts(LoadSpec(source=str(base), adapters={"fr": str(base)}))


def test_one_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    wider = family_checkpoint("llama", tmp_path / "wider", hidden_size=64, head_dim=16)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match=r"of 64 channels and .*proj.weight of 32; it was trained on another base"):
        load(LoadSpec(source=str(base), adapters={"fr": str(lora_folder(wider, tmp_path / "lora"))}), out=out)
    assert not list(out.iterdir())


def changed(adapter: Path, settings: dict[str, Any], **tensors: Any) -> Path:
    """The adapter with other settings, and other tensors under the ends of their names; None leaves one out."""
    from safetensors.torch import load_file, save_file

    told = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(told | settings))
    held = load_file(adapter / "adapter_model.safetensors")
    for end, value in tensors.items():
        name = next(name for name in sorted(held) if name.endswith(f"{end}.weight"))
        held = {one: tensor for one, tensor in held.items() if one != name} | ({} if value is None else {name: value})
    save_file(held, adapter / "adapter_model.safetensors")
    return adapter


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lora_alpha": "16"}, "lora_alpha is '16', and a LoRA's is a number; copy it again"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, and a LoRA's is a number"),
        ({"r": 0}, "r is 0, and a LoRA's is a whole number above 0"),
        ({"r": 3}, "lora_A.weight is of rank 4, and adapter_config.json says 3; copy both again"),
    ],
)
def test_settings_that_do_not_go_with_its_file_are_told_in_the_plan(
    base: Path, tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    adapter = changed(lora_folder(base, tmp_path / "one"), settings)
    with pytest.raises(CheckpointError, match=re.escape(told)):
        read_facts(LoadSpec(source=str(base), adapters={"one": str(adapter)}))


@pytest.mark.parametrize(
    ("settings", "tensors", "told"),
    [
        ({"layers_to_transform": [0]}, {}, "has the shape [4, 32] in its file, and adapter_config.json asks for none"),
        ({"exclude_modules": ["q_proj"]}, {}, "and adapter_config.json asks for none; copy both again"),
        ({"rank_pattern": {"q_proj": 2}}, {}, "has the shape [4, 32] in its file, and adapter_config.json asks for [2, 32]"),
        ({}, {"q_proj.lora_B": None}, "q_proj.lora_B.weight has the shape none in its file"),
        ({}, {"q_proj.lora_A": torch.full((4, 32), torch.nan)}, "q_proj.lora_A.weight holds NaN or infinite values"),
    ],
)
def test_what_peft_would_leave_out_or_begin_anew_is_told_at_load(
    base: Path, tmp_path: Path, settings: dict[str, Any], tensors: dict[str, Any], told: str
) -> None:
    """It only warns, and the champion would answer by an adapter with a part of it, or by no numbers."""
    adapter = changed(lora_folder(base, tmp_path / "one"), settings, **tensors)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=re.escape(told)):
        load(LoadSpec(source=str(base), adapters={"one": str(adapter)}), out=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
