"""Adapters that are kept beside a checkpoint: copied with it, computed with by peft, and refused where they are more than LoRA."""

from __future__ import annotations

import json
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
