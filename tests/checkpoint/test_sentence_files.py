"""What sentence-transformers' files say is read as that library reads them, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from featherweight.checkpoint.files import Listing, read_json
from featherweight.checkpoint.heads import head_changes
from featherweight.checkpoint.sentence_files import embedding, made
from featherweight.errors import CheckpointError
from featherweight.model.heads import SentenceEmbedding
from tests.support.heads import head_checkpoint, loaded, sentence_files

Files = dict[str, Any]


def bert(**told: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(max_position_embeddings=64, **told)


def written(folder: Path, files: Files, **pooling: Any) -> Listing:
    """A folder with a module that pools and one that normalizes, and `files` in the place of its own."""
    sentence_files(folder, **pooling)
    for name, told in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(told))
    return Listing.of(folder)


def modules(*kinds: str) -> Files:
    """modules.json of these classes, each in a folder of its number and name, the first in none."""
    names = [kind.rpartition(".")[2] for kind in kinds]
    paths = [f"{place}_{name}" if place else "" for place, name in enumerate(names)]
    return {"modules.json": [{"path": path, "type": kind} for path, kind in zip(paths, kinds, strict=True)]}


def own(*kinds: str) -> Files:
    return modules(*(f"sentence_transformers.models.{kind}" for kind in kinds))


@pytest.mark.parametrize(
    ("said", "modes"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ("max", "mean")),
        (
            {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            ("cls", "mean", "lasttoken"),
        ),
        ({"pooling_mode": ["mean", "max"]}, ("mean", "max")),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, ("cls",)),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": False}, ("mean",)),
        ({"pooling_mode": "mean", "include_prompt": False}, ("mean",)),
    ],
)
def test_modes_are_put_end_to_end_in_the_librarys_order(tmp_path: Path, said: Files, modes: tuple[str, ...]) -> None:
    assert embedding(written(tmp_path, {}, **said), bert()).pooling == modes


def test_settings_under_the_names_that_older_releases_gave_them(tmp_path: Path) -> None:
    listing = written(tmp_path, {"sentence_roberta_config.json": {"max_seq_length": 9, "do_lower_case": True}})
    (tmp_path / "sentence_bert_config.json").unlink()
    assert embedding(Listing.of(tmp_path), bert()) == SentenceEmbedding(("mean",), True, 9, True)
    assert "sentence_roberta_config.json" in listing.sizes


def test_what_does_nothing_outside_of_training_is_passed_by(tmp_path: Path) -> None:
    listing = written(tmp_path, own("Transformer", "Dropout", "Pooling") | {"2_Pooling/config.json": {"pooling_mode": "cls"}})
    assert embedding(listing, bert()) == SentenceEmbedding(("cls",), False, 24)


PROMPTED = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}


@pytest.mark.parametrize(
    ("files", "pooling", "wrong"),
    [
        (own("Router", "Pooling"), {}, "Router module stands in the place of a model"),
        (own("WordEmbeddings", "Pooling"), {}, "WordEmbeddings module stands in the place of a model"),
        (modules("custom_st.Transformer"), {}, "Transformer module stands in the place of a model"),
        (own("Transformer"), {}, "names no Pooling module"),
        (own("Transformer", "Pooling", "LayerNorm"), {}, "go through sentence-transformers' LayerNorm module"),
        ({"2_Normalize/config.json": {"module_input_name": "token_embeddings"}}, {}, "Normalize module"),
        ({"config_sentence_transformers.json": PROMPTED}, {"include_prompt": False}, "leaves the prompt out"),
        ({"sentence_bert_config.json": {"tokenizer_args": {"model_max_length": 5}}}, {}, "tokenizer_args asks for what"),
        ({"sentence_bert_config.json": {"max_seq_length": -1}}, {}, "max_seq_length is -1, and must be a whole number, or null"),
        ({"sentence_bert_config.json": {"max_seq_length": "9"}}, {}, "max_seq_length is '9', and must be a whole number"),
        ({"config_sentence_transformers.json": {"prompts": {"query": 5}}}, {}, "prompts must be an object of texts by their names"),
        ({"sentence_bert_config.json": {"processing_kwargs": {"text": {"max_length": 4}}}}, {}, "processing_kwargs asks for what"),
        (
            {"sentence_bert_config.json": {"modality_config": {"text": {"method_output_name": "pooler_output"}}}},
            {},
            "modality_config",
        ),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(tmp_path: Path, files: Files, pooling: Files, wrong: str) -> None:
    with pytest.raises(CheckpointError, match=wrong):
        embedding(written(tmp_path, files, **pooling), bert())


@pytest.mark.parametrize("kind", ["StaticEmbedding", "WordEmbeddings", "Router"])
def test_vectors_that_come_from_no_transformer_are_told_where_there_is_no_config(tmp_path: Path, kind: str) -> None:
    """Their first module lies in a folder of its own, of which a config.json would be copied up in vain."""
    with pytest.raises(CheckpointError, match=f"has no config.json; its vectors come from sentence-transformers' {kind} module"):
        read_json(written(tmp_path, own(kind, "Normalize")), "config.json")


@pytest.mark.parametrize("kind", ["SparseEncoder", "MultiVectorEncoder"])
def test_other_kinds_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckpointError, match=f"saved it as a {kind}, which is not known here"):
        made(written(tmp_path, {"config_sentence_transformers.json": {"model_type": kind}}))


def test_a_cross_encoder_scores_and_makes_no_vectors(tmp_path: Path) -> None:
    """Releases from 6.0 on write a modules.json beside it too, and its activation beside that."""
    identity = "torch.nn.modules.linear.Identity"
    told = {"config_sentence_transformers.json": {"model_type": "CrossEncoder", "activation_fn": identity}}
    listing = written(tmp_path, own("Transformer") | told)
    changes, note = head_changes(
        listing, bert(architectures=["BertForSequenceClassification"], num_labels=1), ["classifier.weight"]
    )
    assert (changes, note) == ({"sentence_transformers": {"activation_fn": identity}}, None)


def test_what_stands_behind_a_cross_encoder_is_refused(tmp_path: Path) -> None:
    told = {"config_sentence_transformers.json": {"model_type": "CrossEncoder"}}
    listing = written(tmp_path, own("Transformer", "Dense") | told)
    with pytest.raises(CheckpointError, match="go through sentence-transformers' Dense module"):
        head_changes(listing, bert(architectures=["BertForSequenceClassification"], num_labels=1), ["classifier.weight"])


def test_the_encoder_of_an_encoder_decoder_is_not_taken_for_a_translator(tmp_path: Path) -> None:
    from transformers import T5Config

    with pytest.raises(CheckpointError, match="with the encoder of this t5 alone"):
        head_changes(written(tmp_path, {}), T5Config(architectures=["T5ForConditionalGeneration"]), ["shared.weight"])


NAMES = "config_sentence_transformers.json"


def test_vectors_are_cut_to_their_first_numbers_and_not_normalized_again(tmp_path: Path) -> None:
    """As `encode` of sentence-transformers 6.2 does it where a model was saved with truncate_dim."""
    import torch

    told = embedding(written(tmp_path, {NAMES: {"truncate_dim": 3}}), bert())
    kept = SentenceEmbedding.of(bert(**told.settings()))
    assert (told.width, kept.width) == (3, 3)
    hidden, mask = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 5)
    whole = torch.nn.functional.normalize(hidden.mean(1), dim=-1)
    assert torch.allclose(kept.pool(hidden, mask), whole[:, :3])


@pytest.mark.parametrize("wrong", [0, "8", True])
def test_what_is_no_count_of_numbers_is_refused(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(CheckpointError, match=f"truncate_dim is {wrong!r}"):
        embedding(written(tmp_path, {NAMES: {"truncate_dim": wrong}}), bert())


def test_the_name_of_no_prompt_is_refused_and_those_of_every_model_are_empty(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "query: "}}
    assert embedding(written(tmp_path, {NAMES: prompts | {"default_prompt_name": "document"}}), bert()).prompt == ""
    with pytest.raises(CheckpointError, match="and there is no such prompt; known: query, document"):
        embedding(written(tmp_path, {NAMES: prompts | {"default_prompt_name": "other"}}), bert())


def with_layer(folder: Path, told: Files, **tensors: tuple[int, ...]) -> Listing:
    import torch
    from safetensors.torch import save_file

    written(folder, own("Transformer", "Pooling", "Dense") | {"2_Dense/config.json": told})
    save_file({name.replace("_", "."): torch.ones(shape) for name, shape in tensors.items()}, folder / "2_Dense/model.safetensors")
    return Listing.of(folder)


@pytest.mark.parametrize(
    ("told", "tensors", "wrong"),
    [
        ({}, {"linear_weight": (4, 16), "linear_bias": (4,)}, r"linear.weight has the shape \[4, 16\], .* asks for \[4, 32\]"),
        ({}, {"linear_weight": (4, 32)}, r"linear.bias has the shape none, .* asks for \[4\]"),
        ({"bias": False}, {"linear_weight": (4, 32), "linear_bias": (4,)}, r"linear.bias has the shape \[4\], .* asks for none"),
        ({"bias": False, "out_features": 5}, {"linear_weight": (4, 32)}, r"linear.weight has the shape .* asks for \[5, 32\]"),
        ({"bias": False}, {"weight": (4, 32)}, r"linear.weight has the shape none, .*"),
        ({"bias": False, "use_residual": True}, {"linear_weight": (4, 32)}, r"residual.weight has the shape none, .*"),
    ],
)
def test_a_layer_that_does_not_fit_behind_the_pooling_is_told_by_its_headers(
    tmp_path: Path, told: Files, tensors: dict[str, tuple[int, ...]], wrong: str
) -> None:
    with pytest.raises(CheckpointError, match=f"2_Dense/model.safetensors: {wrong}; they do not belong together"):
        embedding(with_layer(tmp_path, told, **tensors), bert(hidden_size=32, num_attention_heads=4))


def test_a_layer_that_fits_is_taken_and_one_that_is_cut_short_is_not(tmp_path: Path) -> None:
    listing = with_layer(tmp_path, {"bias": False, "use_residual": True}, linear_weight=(32, 32))
    config = bert(hidden_size=32, num_attention_heads=4)
    assert [one.path for one in embedding(listing, config).dense] == ["2_Dense"]
    file = tmp_path / "2_Dense/model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"2_Dense/model.safetensors is truncated"):
        embedding(Listing.of(tmp_path), config)


def test_numbers_that_are_none_in_a_layer_behind_the_pooling_are_told_at_load(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    source = head_checkpoint("bert", "feature-extraction", tmp_path / "made")
    with_layer(source, {"bias": False}, linear_weight=(4, 32))
    save_file({"linear.weight": torch.full((4, 32), torch.nan)}, source / "2_Dense/model.safetensors")
    with pytest.raises(CheckpointError, match=r"2_Dense/model.safetensors: tensor linear.weight holds NaN"):
        loaded(source, tmp_path / "out", "feature-extraction")
