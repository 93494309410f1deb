"""Checkpoints that contradict themselves, or name their tensors otherwise, are settled by what their files hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from featherweight.checkpoint.facts import facts_for_any_task, read_facts
from featherweight.checkpoint.files import INDEX, PICKLE, WEIGHTS
from featherweight.checkpoint.inspection import inspect_checkpoint
from featherweight.checkpoint.overwritten import as_loaded, overwritten
from featherweight.checkpoint.saving import save_model
from featherweight.checkpoint.settling import heeds
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError
from featherweight.quantization.spec import QuantizeSpec
from featherweight.runtimes.generation_settings import GenerationSettings
from featherweight.runtimes.parity import load_reference
from featherweight.runtimes.spec import ExportSpec
from featherweight.text.documents import Document, write_documents
from tasks.export import export
from tasks.load import load
from tasks.quantize import quantize
from tests.support.families import WORDS, family_checkpoint, tiny_model
from tests.support.notes import Notes

IDS = torch.tensor([[1, 7, 20, 8, 8, 29, 4]])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def llama(folder: Path, *, tied: bool) -> Path:
    return family_checkpoint("llama", folder, tie_word_embeddings=tied)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_reference(folder)(IDS).logits


def configure(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def rename(folder: Path, change: Callable[[str], str]) -> None:
    tensors = {change(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def taken(folder: Path, out: Path, **options: Any) -> tuple[dict[str, float], list[str]]:
    told = Notes()
    metrics = load(LoadSpec.model_validate({"source": str(folder), **options}), out=out, progress=told)
    return dict(metrics), told.notes


@pytest.mark.slow
@pytest.mark.parametrize("in_shards", [False, True])
def test_a_head_of_its_own_beside_a_config_that_ties_is_kept_and_said(tmp_path: Path, out: Path, in_shards: bool) -> None:
    folder = llama(tmp_path / "source", tied=False)
    if in_shards:
        model = load_reference(folder)
        (folder / WEIGHTS).unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
    expected = logits(folder)
    configure(folder, tie_word_embeddings=True)
    metrics, notes = taken(folder, out)
    assert metrics["head_settled"] == 1
    assert any("a head of their own, which is kept" in note for note in notes)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert (out / INDEX).exists() == in_shards
    assert torch.equal(logits(out), expected)
    assert not inspect_checkpoint(out).tied
    assert not any(path.is_symlink() for path in out.rglob("*"))


@pytest.mark.engine
@pytest.mark.parametrize("engine", [{"engine": "ctranslate2", "compute_type": "float32"}, {"engine": "torchao-int8"}])
def test_engines_serve_the_head_that_the_file_holds(tmp_path: Path, out: Path, engine: dict[str, Any]) -> None:
    """They disagreed: one took the file's head, another the embedding."""
    folder = llama(tmp_path / "source", tied=False)
    expected = logits(folder)
    configure(folder, tie_word_embeddings=True)
    taken(folder, out)
    text, small, served = (tmp_path / name for name in ("text", "small", "served"))
    write_documents(text, [Document(str(i), " ".join(WORDS.split()[i:])) for i in range(12)])
    small.mkdir()
    served.mkdir()
    quantize(QuantizeSpec.of(sequence=16, samples=2), checkpoint=out, text=text, calibration=text, out=small)
    assert (logits(small) - expected).abs().max() < 0.2 < (expected - expected.mean()).abs().max()
    packed = out if "compute_type" in engine else small
    metrics = export(ExportSpec.model_validate(engine), checkpoint=packed, calibration=text, out=served)
    assert metrics["parity_max_abs"] < 1e-3


def test_a_config_with_a_head_that_the_file_lacks_is_tied(tmp_path: Path, out: Path) -> None:
    folder = llama(tmp_path / "source", tied=True)
    expected = logits(folder)
    configure(folder, tie_word_embeddings=False)
    metrics, notes = taken(folder, out)
    assert metrics["head_settled"] == 1
    assert any("the embedding is the head" in note for note in notes)
    assert torch.equal(logits(out), expected)


def test_what_does_not_contradict_itself_is_left_alone(tmp_path: Path, out: Path) -> None:
    folder = llama(tmp_path / "source", tied=True)
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / WEIGHTS, {"format": "pt"})
    metrics, _ = taken(folder, out)
    assert not metrics.keys() & {"head_settled", "renamed_tensors"}
    assert (out / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_tied_matrix_under_the_heads_name_alone(tmp_path: Path, out: Path) -> None:
    folder = llama(tmp_path / "source", tied=True)
    expected = logits(folder)
    rename(folder, lambda name: name.replace("model.embed_tokens", "lm_head"))
    assert taken(folder, out)[0]["renamed_tensors"] == 1
    assert "model.embed_tokens.weight" in load_file(out / WEIGHTS)
    assert torch.equal(logits(out), expected)


PLACES = {
    "without the base model's prefix": lambda name: name.removeprefix("model."),
    "of torch.compile": lambda name: f"_orig_mod.{name}",
    "of one compiled block": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "of DistributedDataParallel": lambda name: f"module.{name}",
    "of both": lambda name: f"module._orig_mod.{name}",
    "of FSDP": lambda name: f"_fsdp_wrapped_module.{name.replace('layers.', 'layers._checkpoint_wrapped_module.')}",
    "of peft, merged": lambda name: f"base_model.model.{name}",
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_names_become_those_that_transformers_reads(place: str, tied: bool, tmp_path: Path, out: Path) -> None:
    folder = llama(tmp_path / "source", tied=tied)
    expected, right = logits(folder), set(load_file(folder / WEIGHTS))
    rename(folder, PLACES[place])
    wrong = set(load_file(folder / WEIGHTS)) - right
    metrics, notes = taken(folder, out)
    assert metrics["renamed_tensors"] == len(wrong) > 0
    assert any("take the names that transformers reads them under" in note for note in notes)
    assert set(load_file(out / WEIGHTS)) == right
    assert torch.equal(logits(out), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "prefix"), [("gpt2", "transformer."), ("bert", "bert."), ("gpt_neox", "gpt_neox.")])
def test_other_families_likewise(kind: str, prefix: str, tmp_path: Path, out: Path) -> None:
    folder = family_checkpoint(kind, tmp_path / "source")
    expected = logits(folder)
    rename(folder, lambda name: name.removeprefix(prefix))
    metrics, _ = taken(folder, out, task="fill-mask" if kind == "bert" else "text-generation")
    assert metrics["renamed_tensors"] > 10
    assert "head_settled" not in metrics, "a head under its old name, as GPT-NeoX's embed_out, is a head"
    assert torch.equal(logits(out), expected)


@pytest.mark.parametrize("named", [None, [], ["LLaMAForCausalLM"]])
def test_a_class_that_is_not_named_or_not_known_is_the_model_types(named: list[str] | None, tmp_path: Path, out: Path) -> None:
    """As to transformers' AutoModelForCausalLM; engines look at the name."""
    folder = llama(tmp_path / "source", tied=True)
    expected = logits(folder)
    configure(folder, architectures=named)
    assert facts_for_any_task(LoadSpec(source=str(folder))).config.architectures == ["LlamaForCausalLM"]
    taken(folder, out)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert torch.equal(logits(out), expected)


@pytest.mark.parametrize("in_config", [None, 4])
def test_targets_begin_as_generate_begins_them(in_config: int | None, tmp_path: Path, out: Path) -> None:
    folder = family_checkpoint("t5", tmp_path / "source")
    configure(folder, decoder_start_token_id=in_config)
    (folder / "generation_config.json").write_text('{"decoder_start_token_id": 3, "eos_token_id": 2}')
    taken(folder, out, task="text2text-generation")
    assert json.loads((out / "config.json").read_text())["decoder_start_token_id"] == 3
    assert (out / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("kind", ["gpt2", "gptj"])
def test_constants_that_were_stored_once_are_no_strangers(kind: str, tmp_path: Path, out: Path) -> None:
    """As in the first files of both."""
    folder = family_checkpoint(kind, tmp_path / "source")
    expected, tensors = logits(folder), load_file(folder / WEIGHTS)
    constants = {f"transformer.h.0.attn.{name}": torch.ones(1, 1, 4, 4) for name in ("bias", "masked_bias")}
    save_file(tensors | constants, folder / WEIGHTS, metadata={"format": "pt"})
    taken(folder, out)
    assert torch.equal(logits(out), expected)


def test_how_a_model_runs_is_left_to_who_runs_it(tmp_path: Path, out: Path) -> None:
    """Code that is not on this machine, outputs beside the logits, or these in another form."""
    folder = llama(tmp_path / "found", tied=True)
    wanted = logits(folder)
    configure(
        folder, attn_implementation="flash_attention_2", return_dict=False, output_hidden_states=True, quantization_config=None
    )
    taken(folder, out)
    told = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in told
    assert (told["attn_implementation"], told["return_dict"], told["output_hidden_states"]) == (None, True, False)
    assert torch.equal(logits(out), wanted)


def test_a_renamed_checkpoint_is_quantized(tmp_path: Path, out: Path) -> None:
    """quantize said "no Linear weights", naming a path that was not the user's."""
    folder = llama(tmp_path / "source", tied=True)
    rename(folder, lambda name: name.removeprefix("model."))
    taken(folder, out)
    text, small = tmp_path / "text", tmp_path / "small"
    write_documents(text, [Document(str(i), " ".join(WORDS.split()[i:])) for i in range(12)])
    small.mkdir()
    metrics = quantize(QuantizeSpec.of(sequence=16, samples=2), checkpoint=out, text=text, calibration=text, out=small)
    assert metrics["float_weights"] < 0.05


def test_what_automodel_saved_gets_its_head_back_where_that_is_the_embedding(tmp_path: Path, out: Path) -> None:
    folder, base = llama(tmp_path / "source", tied=True), tmp_path / "base"
    shutil.copytree(folder, base)
    load_reference(folder).model.save_pretrained(base)
    assert json.loads((base / "config.json").read_text())["architectures"] == ["LlamaModel"]
    metrics, _ = taken(base, out)
    assert metrics["renamed_tensors"] > 10
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert torch.equal(logits(out), logits(folder))


def test_a_head_that_was_never_saved_is_not_invented(tmp_path: Path, out: Path) -> None:
    """transformers draws a random one and goes on."""
    folder, base = llama(tmp_path / "source", tied=False), tmp_path / "base"
    shutil.copytree(folder, base)
    load_reference(folder).model.save_pretrained(base)
    for refusing in (lambda: read_facts(LoadSpec(source=str(base))), lambda: taken(base, out)):
        with pytest.raises(CheckpointError, match="saved from the base model, without its output head") as error:
            refusing()
        assert str(base) in str(error.value)
    assert list(out.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("change", PLACES.values(), ids=PLACES)
def test_pickles_are_renamed_as_they_are_converted(change: Callable[[str], str], tmp_path: Path, out: Path) -> None:
    folder = llama(tmp_path / "source", tied=True)
    expected = logits(folder)
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save({change(name): tensor for name, tensor in tensors.items()}, folder / PICKLE)
    (folder / WEIGHTS).unlink()
    taken(folder, out, allow_pickle=True)
    assert torch.equal(logits(out), expected)


def test_names_of_another_model_are_told_beside_those_that_are_missing(tmp_path: Path) -> None:
    folder = llama(tmp_path / "found", tied=True)
    rename(folder, lambda name: f"student.{name}")
    with pytest.raises(
        CheckpointError, match=r"is missing \(and \d+ more\); there is student\.model\.\S+ .*do not belong together"
    ):
        read_facts(LoadSpec(source=str(folder)))


def test_errors_after_a_renaming_name_the_users_path(tmp_path: Path, out: Path) -> None:
    folder = llama(tmp_path / "source", tied=True)
    rename(folder, lambda name: f"module.{name}")
    tensors = load_file(folder / WEIGHTS)
    del tensors["module.model.norm.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of LlamaForCausalLM is missing") as error:
        taken(folder, out)
    assert str(error.value).startswith(f"{folder}:")
    assert list(out.iterdir()) == []


def test_generation_settings_of_a_config_outlive_the_saving_of_its_model(tmp_path: Path) -> None:
    folder, out = llama(tmp_path / "source", tied=False), tmp_path / "out"
    (folder / "generation_config.json").unlink()
    configure(folder, no_repeat_ngram_size=2, temperature=0.6)
    save_model(load_reference(folder), out, folder)
    told = GenerationSettings.read(out).values
    assert told == GenerationSettings.read(folder).values
    assert told["no_repeat_ngram_size"] == 2


def youtu(folder: Path) -> Path:
    """A checkpoint whose padding token's row is not zero: transformers makes it zero when it loads one."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    narrow = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8}
    return family_checkpoint("youtu", folder, **sizes, **narrow)


def test_what_transformers_writes_into_loaded_weights_is_taken_over_and_said(tmp_path: Path, out: Path) -> None:
    """Engines and quantizers took the row that the file holds, transformers computes with zeros."""
    folder = youtu(tmp_path / "source")
    name, tensors = "model.embed_tokens.weight", load_file(folder / WEIGHTS)
    tensors[name][0] = 3.0
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    expected = logits(folder)
    metrics, notes = taken(folder, out)
    assert metrics["overwritten_tensors"] == 1
    assert "head_settled" not in metrics
    assert any(f"transformers writes into {name}" in note for note in notes)
    stored = load_file(out / WEIGHTS)
    assert not stored[name][0].any()
    assert torch.equal(stored[name][1:], tensors[name][1:])
    assert all(torch.equal(stored[other], tensors[other]) for other in tensors if other != name)
    assert torch.equal(logits(out), expected)


def test_weights_that_are_as_transformers_has_them_are_left_alone(tmp_path: Path, out: Path) -> None:
    folder = youtu(tmp_path / "source")
    tensors = load_file(folder / WEIGHTS)
    tensors["model.embed_tokens.weight"][0] = 0.0
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    assert "overwritten_tensors" not in taken(folder, out)[0]
    assert (out / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_row_that_training_has_filled_again_is_saved_as_transformers_will_have_it(tmp_path: Path, out: Path) -> None:
    """With a head that is the embedding every row learns, that of the padding token too."""
    source = youtu(tmp_path / "source")
    model = load_reference(source)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 3.0
    save_model(model, out, source)
    assert not load_file(out / WEIGHTS)["model.embed_tokens.weight"][0].any()
    assert torch.equal(model(IDS).logits, logits(out))


def test_a_model_that_was_saved_still_writes_as_its_checkpoint_asks(tmp_path: Path) -> None:
    """What is compared with an engine is written by the model from which the engine's files were saved."""
    model: Any = tiny_model("llama", vocab_size=40)
    model.generation_config.forced_bos_token_id, own = 7, model.generation_config
    save_model(model, tmp_path)
    assert model.generation_config is own and own.forced_bos_token_id == 7
    save_model(tiny_model("bert", vocab_size=40), tmp_path / "encoder")  # which has none


def test_weights_that_would_be_others_each_time_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", vocab_size=40)
    monkeypatch.setattr(type(model.model), "_init_weights", _random_norms)
    assert "model.norm.weight" in overwritten(model)
    with pytest.raises(CheckpointError, match=r"gives model\.norm\.weight of a llama model random values"):
        as_loaded(model, {"model.norm.weight": torch.ones(32)})


def _random_norms(self: Any, module: Any) -> None:
    if type(module).__name__ == "LlamaRMSNorm":
        module.weight.data.normal_()


def test_a_model_type_that_ties_no_head_does_not_heed_being_told_to() -> None:
    """DBRX refuses its own configuration then, and what transformers says of all its parts too."""
    from transformers import AutoConfig

    assert not heeds(AutoConfig.for_model("dbrx"), True)
    assert heeds(AutoConfig.for_model("llama"), True) and heeds(AutoConfig.for_model("llama"), False)
