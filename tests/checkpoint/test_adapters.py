"""A LoRA adapter is loaded merged into its base, or refused; what lies beside full weights is never dropped in silence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from featherweight.checkpoint.facts import read_facts
from featherweight.checkpoint.fetching import SOURCES, Source, source_fingerprint
from featherweight.checkpoint.files import Listing
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError
from featherweight.runtimes.parity import load_reference
from tasks.load import load
from tests.support.families import family_checkpoint, lora_folder
from tests.support.heads import sentence_files

IDS = torch.tensor([[1, 7, 20, 8, 8, 29, 4]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_checkpoint("llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA folder as peft saves one, its second factor no zeros."""
    return lora_folder(base, tmp_path_factory.mktemp("lora") / "adapter")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_reference(folder)(IDS).logits


def right(base: Path, adapter: Path) -> torch.Tensor:
    """peft's own forward, unmerged."""
    from peft import PeftModel

    with torch.no_grad():
        return PeftModel.from_pretrained(load_reference(base), str(adapter)).eval()(IDS).logits


def taken(source: Path, out: Path, **options: Any) -> dict[str, float]:
    return dict(load(LoadSpec.model_validate({"source": str(source), **options}), out=out))


def refusal(source: Path, out: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        taken(source, out, **options)
    assert "\n" not in str(error.value)
    assert list(out.iterdir()) == []
    return str(error.value)


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_base_that_it_names(base: Path, adapter: Path, out: Path) -> None:
    metrics = taken(adapter, out)
    assert metrics["adapters_merged"] == 1
    torch.testing.assert_close(logits(out), right(base, adapter), rtol=0, atol=1e-5)
    assert (logits(out) - logits(base)).abs().max() > 0.05
    assert not [path.name for path in out.rglob("*") if path.name.startswith(("adapter", ".fetch")) or path.is_symlink()]


def test_the_recipe_may_name_another_base(base: Path, adapter: Path, tmp_path: Path, out: Path) -> None:
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    told = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": None}))
    assert "set checkpoint.base" in refusal(moved, out)
    taken(moved, out, base=str(base))
    torch.testing.assert_close(logits(out), right(base, adapter), rtol=0, atol=1e-5)


def test_what_an_adapter_from_afar_is_merged_into_is_part_of_its_identity(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are looked into where they are: another base of the same name is another model."""
    here, far = Path(shutil.copytree(base, tmp_path / "base")), Path(shutil.copytree(adapter, tmp_path / "far"))
    told = json.loads((far / "adapter_config.json").read_text())
    (far / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": str(here)}))
    afar = Source(lambda *_: far, lambda _: ["a commit"], lambda _: Listing.of(far))
    monkeypatch.setitem(SOURCES, "hf:", afar)
    before = source_fingerprint(LoadSpec(source="hf:some/adapter"))
    assert source_fingerprint(LoadSpec(source="hf:some/adapter")) == before
    (here / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert source_fingerprint(LoadSpec(source="hf:some/adapter")) != before


def test_a_base_that_is_gone_is_named(adapter: Path, tmp_path: Path, out: Path) -> None:
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    told = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": "/nowhere/at/all"}))
    assert "/nowhere/at/all does not exist" in refusal(moved, out)


@pytest.mark.slow
def test_full_weights_with_an_adapter_beside_them_are_what_the_recipe_says(
    base: Path, adapter: Path, tmp_path: Path, out: Path
) -> None:
    both = Path(shutil.copytree(base, tmp_path / "both"))
    for path in adapter.glob("adapter*"):
        shutil.copy(path, both)
    assert "set checkpoint.adapter: merge to add it to them, or ignore" in refusal(both, out)
    taken(both, out, adapter="merge")
    torch.testing.assert_close(logits(out), right(base, adapter), rtol=0, atol=1e-5)
    plain = tmp_path / "plain"
    plain.mkdir()
    taken(both, plain, adapter="ignore")
    assert torch.equal(logits(plain), logits(base))
    assert not list(plain.glob("adapter*"))


@pytest.mark.slow
def test_an_adapter_that_added_tokens(base: Path, tmp_path: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    wide, tokenizer = tmp_path / "wide", AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>", "<newer>"])
    model = load_reference(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    shutil.copytree(base, wide)
    model.save_pretrained(wide)
    tokenizer.save_pretrained(wide)
    adapter = lora_folder(wide, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    tokenizer.save_pretrained(adapter)
    taken(adapter, out, base=str(base))
    assert AutoTokenizer.from_pretrained(out)("<newer>").input_ids[-1] == len(tokenizer) - 1
    torch.testing.assert_close(logits(out), right(wide, adapter), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_pickled_adapter_is_refused_until_the_recipe_allows_it(base: Path, adapter: Path, tmp_path: Path, out: Path) -> None:
    from safetensors.torch import load_file

    pickled = Path(shutil.copytree(adapter, tmp_path / "pickled"))
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    assert "checkpoint.allow_pickle: true" in refusal(pickled, out)
    taken(pickled, out, allow_pickle=True)
    torch.testing.assert_close(logits(out), right(base, adapter), rtol=0, atol=1e-5)


def test_an_adapter_for_another_model_is_refused_in_a_line(adapter: Path, tmp_path: Path, out: Path) -> None:
    other = family_checkpoint("llama", tmp_path / "other", hidden_size=64, head_dim=16)
    wrong = "channels, and its base's matrix of"
    assert wrong in refusal(adapter, out, base=str(other))
    with pytest.raises(CheckpointError, match=wrong):
        read_facts(LoadSpec(source=str(adapter), base=str(other)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "MAGIC"}, "peft_type is 'MAGIC', which peft .* does not know; a LoRA's is LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": "four"}, "r is 'four', and a LoRA's is a whole number above 0"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": None}, "lora_alpha is None, and a LoRA's is a number"),
        ({"r": 99}, r"is of rank \d+, and adapter_config\.json says 99"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa_niter_4, which peft makes anew, and not the same"),
        ({"task_type": "SEQ_CLS"}, r"one for text-classification, and its base is for text-generation: .*merge_and_unload\(\)"),
        ({"base_model_name_or_path": "."}, "is named as its own base model; set checkpoint.base"),
    ],
)
def test_settings_that_peft_stumbles_over_are_told_in_the_plan(
    changes: dict[str, Any], reason: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "changed"))
    monkeypatch.chdir(folder)
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | changes))
    with pytest.raises(CheckpointError, match=reason) as error:
        read_facts(LoadSpec(source=str(folder)))
    assert "\n" not in str(error.value)


def test_an_adapter_that_makes_vectors_of_its_base_is_refused(adapter: Path, tmp_path: Path, out: Path) -> None:
    """As sentence-transformers saves one: the base alone says nothing of vectors."""
    folder = sentence_files(Path(shutil.copytree(adapter, tmp_path / "vectors")))
    with pytest.raises(CheckpointError, match="sentence-transformers saved this adapter") as error:
        read_facts(LoadSpec(source=str(folder)))
    assert str(error.value) == refusal(folder, out)


def test_an_adapter_that_peft_would_leave_out_is_refused(adapter: Path, tmp_path: Path, out: Path) -> None:
    """peft warns where a file's names are not its own, or the base has other layers, and merges nothing."""
    renamed = Path(shutil.copytree(adapter, tmp_path / "renamed"))
    tensors = load_file(renamed / "adapter_model.safetensors")
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    save_file(plain, renamed / "adapter_model.safetensors")
    assert re.search(r"adapter's model\.layers\.0\S+ has no place in its base \(and 7 more\)", refusal(renamed, out))
    deeper = family_checkpoint("llama", tmp_path / "deeper", num_hidden_layers=3)
    assert re.search(r"layers\.2\S+ is missing, and its base has a place for it", refusal(adapter, out, base=str(deeper)))


def test_an_adapter_that_changes_no_weight_is_refused(base: Path, adapter: Path, tmp_path: Path, out: Path) -> None:
    prompts = Path(shutil.copytree(adapter, tmp_path / "prompts"))
    told = json.loads((prompts / "adapter_config.json").read_text())
    (prompts / "adapter_config.json").write_text(json.dumps(told | {"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(CheckpointError, match="is a PREFIX_TUNING adapter, which changes no weight"):
        read_facts(LoadSpec(source=str(prompts)))
    assert "PREFIX_TUNING" in refusal(prompts, out)


def test_the_fingerprint_knows_adapter_and_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    one, two = (Path(shutil.copytree(base, tmp_path / name)) for name in ("one", "two"))
    found = {source_fingerprint(LoadSpec(source=str(adapter), base=str(folder))) for folder in (one, two)}
    assert len(found) == 1, "the same bytes elsewhere are the same"
    (two / "config.json").write_text((two / "config.json").read_text() + "\n")
    assert source_fingerprint(LoadSpec(source=str(adapter), base=str(two))) not in found
    changed = Path(shutil.copytree(adapter, tmp_path / "changed"))
    told = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(told | {"lora_alpha": 99}))
    assert source_fingerprint(LoadSpec(source=str(changed), base=str(one))) not in found


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"]},
     {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, {"target_modules": ["q_proj"]}],
    ids=["embedding", "head", "both as one", "neither"],
)  # fmt: skip
def test_what_was_learned_for_the_embedding_or_the_head_alone_changes_no_other_matrix(
    options: dict[str, Any], tmp_path: Path, out: Path
) -> None:
    tied = family_checkpoint("llama", tmp_path / "tied", tie_word_embeddings=True)
    adapter = lora_folder(tied, tmp_path / "lora", **options)
    taken(adapter, out)
    assert (logits(out) - right(tied, adapter)).abs().max() < 1e-4
    assert (logits(out) - logits(tied)).abs().max() > 1e-3
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is ("q_proj" in options["target_modules"])


@pytest.mark.parametrize("setting", [{"layer_replication": [[0, 2], [0, 2]]}, {"alora_invocation_tokens": [3]}])
def test_what_no_weights_of_the_base_stand_for_is_told_in_the_plan(
    setting: dict[str, Any], adapter: Path, tmp_path: Path, out: Path
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "never"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    for ask in (lambda: read_facts(LoadSpec(source=str(folder))), lambda: taken(folder, out)):
        with pytest.raises(CheckpointError, match=rf"\({next(iter(setting))}\), and so cannot be merged"):
            ask()


def damaged(folder: Path) -> None:
    """A tokenizer of a kind that no library knows."""
    told = {"version": "1.0", "added_tokens": [], "model": {"type": "Nope", "vocab": {"a": 0}}}
    (folder / "tokenizer.json").write_text(json.dumps(told))


def beyond(folder: Path) -> None:
    """A tokenizer with an id that the embedding lacks."""
    told = json.loads((folder / "tokenizer.json").read_text())
    told["model"]["vocab"]["far"] = 300
    (folder / "tokenizer.json").write_text(json.dumps(told))


@pytest.mark.parametrize("of_its_own", [True, False])
@pytest.mark.parametrize(("fault", "reason"), [(damaged, "the tokenizer does not load"), (beyond, "has ids up to 300")])
def test_the_tokenizer_of_an_adapter_is_opened_in_the_plan(
    base: Path, adapter: Path, out: Path, tmp_path: Path, fault: Any, reason: str, of_its_own: bool
) -> None:
    """Its own, or its base's; loading stopped at it after the weights were merged, or with an error of the library's."""
    given, model = Path(shutil.copytree(adapter, tmp_path / "lora")), Path(shutil.copytree(base, tmp_path / "base"))
    if of_its_own:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(base / name, given / name)
    fault(given if of_its_own else model)
    spec = LoadSpec(source=str(given), base=str(model))
    with pytest.raises(CheckpointError, match=rf"{'lora' if of_its_own else 'base'}: the tokenizer.*{reason.split()[-1]}"):
        read_facts(spec)
    with pytest.raises(CheckpointError, match=reason):
        load(spec, out=out)


def test_what_an_adapters_own_tokenizer_puts_before_a_text_is_known_in_the_plan(base: Path, adapter: Path, tmp_path: Path) -> None:
    given = Path(shutil.copytree(adapter, tmp_path / "lora"))
    assert read_facts(LoadSpec(source=str(given), base=str(base))).lead == (1,)
    told = json.loads((base / "tokenizer.json").read_text())
    (given / "tokenizer.json").write_text(json.dumps(told | {"post_processor": None}))
    shutil.copy(base / "tokenizer_config.json", given / "tokenizer_config.json")
    assert read_facts(LoadSpec(source=str(given), base=str(base))).lead == ()


def test_an_adapter_that_is_cut_short_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    given = Path(shutil.copytree(adapter, tmp_path / "lora"))
    weights = given / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is truncated: \d+ of \d+ bytes"):
        read_facts(LoadSpec(source=str(given), base=str(base)))
