"""Tokens that are never used leave the model and its tokenizer, and what stays computes what it computed, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.distillation.spec import DistillSpec
from featherweight.errors import RecipeError, StageError
from featherweight.model.facts import CheckpointFacts, Values
from featherweight.model.parent import Parent
from featherweight.pruning.spec import PruneSpec
from featherweight.pruning.used_tokens import expected_by, likeliest
from featherweight.spec import Task
from featherweight.text.documents import Document, write_documents
from featherweight.text.model_inputs import example_blocks, inputs_and_labels
from tests.support import tokenizers as small
from tests.support.families import PLAIN_WORDS, tiny_model
from tests.support.heads import head_checkpoint
from tests.support.pruning import SMALL, pruned
from tests.support.slow_tokenizers import slow_checkpoint

FEW = PLAIN_WORDS[:16]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of some of the words that the tokenizers know."""
    folder = tmp_path_factory.mktemp("few")
    write_documents(folder, [Document(str(turn), " ".join([*FEW[turn:], *FEW[:turn]] * 4)) for turn in range(6)])
    return folder


def llama(folder: Path, **changes: Any) -> Path:
    """A byte-level tokenizer, and an embedding with a few rows that no token has."""
    tokenizer = small.byte_level("<s> $A")
    tokenizer.save_pretrained(folder)
    tiny_model("llama", vocab_size=len(tokenizer) + 3, **changes).save_pretrained(folder)
    return folder


def checkpoint(kind: str, folder: Path) -> Path:
    return llama(folder) if kind == "llama" else slow_checkpoint(kind, folder)


def logits_of(folder: Path, text: str) -> tuple[list[str], torch.Tensor]:
    """The tokens of a text, and the float32 logits at each [tokens, vocabulary]."""
    model, tokenizer = opening.load_model(folder), load_tokenizer(folder)
    ids: Any = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return [str(tokenizer.convert_ids_to_tokens(one)) for one in ids[0].tolist()], answer.logits[0]


@pytest.mark.parametrize("kind", ["llama", "t5", "mbart", "bert"])
def test_the_logits_of_the_tokens_that_stay_are_the_same_bits(kind: str, few: Path, tmp_path: Path) -> None:
    source = checkpoint(kind, tmp_path / "source")
    metrics = pruned(PruneSpec.of(**SMALL, method="vocabulary"), source, few, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "kept_tokens.json").read_text())
    text = " ".join(reversed(FEW))
    (tokens, whole), (others, left) = logits_of(source, text), logits_of(tmp_path / "out", text)
    assert tokens == others
    assert torch.equal(whole[:, told["kept"]], left)
    assert (told["of"], len(told["kept"])) == (metrics["tokens_before"], metrics["tokens"])
    assert metrics["tokens"] < metrics["tokens_before"]
    assert metrics["loss_after"] < metrics["loss_before"]  # what the lost tokens were given is shared out among the others


def test_ids_move_in_every_file_and_vocabulary_files_become_one(few: Path, tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    tokenizer = load_tokenizer(source)
    end = tokenizer.convert_tokens_to_ids("Ġriver")
    (source / "generation_config.json").write_text(
        json.dumps(
            {"eos_token_id": [tokenizer.eos_token_id, end], "bad_words_ids": [[end], [tokenizer.convert_tokens_to_ids("Ġstone")]]}
        )
    )
    (source / "vocab.json").write_text("{}")
    pruned(PruneSpec.of(**SMALL, method="vocabulary"), source, few, tmp_path / "out")
    new = load_tokenizer(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert told["eos_token_id"] == [new.eos_token_id, new.convert_tokens_to_ids("Ġriver")]
    assert told["bad_words_ids"] == [[new.convert_tokens_to_ids("Ġriver")]]
    assert not (tmp_path / "out" / "vocab.json").exists()


@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_an_encoder_that_answers_by_labels_or_vectors_keeps_its_answers(task: str, few: Path, tmp_path: Path) -> None:
    source = head_checkpoint("bert", task, tmp_path / "source")
    small.wordpiece("<s> $A </s>").save_pretrained(source)
    metrics = pruned(PruneSpec.of(**SMALL, method="vocabulary"), source, few, tmp_path / "out")
    assert metrics["loss_after"] == pytest.approx(metrics["loss_before"], rel=1e-6)


def test_where_every_piece_has_a_character_without_its_own_none_goes(few: Path, tmp_path: Path) -> None:
    source = head_checkpoint("bert", "text-classification", tmp_path / "source")
    with pytest.raises(StageError, match="drops none"):
        pruned(PruneSpec.of(**SMALL, method="vocabulary"), source, few, tmp_path / "out")


@pytest.mark.parametrize(
    ("keep", "stays", "goes"),
    [
        ({"scripts": ["latin"]}, "Ġriver", "漢"),
        ({"text": True, "tokens": ["Ġriver"]}, "Ġriver", "Ġstone"),
        ({"first": 292}, "Ġthe", "Ġstone"),
        ("text", "Ġthe", "Ġstone"),
    ],
)
def test_what_is_kept_is_named_by_text_tokens_and_scripts(keep: Any, stays: str, goes: str, few: Path, tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    pruned(PruneSpec.of(**SMALL, method="vocabulary", keep=keep), source, few, tmp_path / "out")
    vocabulary = load_tokenizer(tmp_path / "out").get_vocab()
    assert stays in vocabulary
    assert goes not in vocabulary


def test_the_likeliest_tokens_are_those_most_expected() -> None:
    expected = torch.tensor([1.0, 4.0, 2.0, 4.0, 3.0], dtype=torch.float64)
    assert likeliest(expected, 1) == {1}
    assert likeliest(expected, 3) == {1, 3, 4}
    assert likeliest(expected, 9) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_what_a_model_expects_are_its_probabilities_in_float64(kind: str, few: Path, tmp_path: Path) -> None:
    source = checkpoint(kind, tmp_path / "source")
    model: Any = opening.load_model(source)
    blocks = example_blocks(source, model.config, few, 12, limit=4)
    with torch.no_grad():
        logits = model(**inputs_and_labels(model.config, blocks)[0]).logits
    formula = (logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)).sum((0, 1))
    assert torch.allclose(expected_by(model, blocks), formula, rtol=1e-4)


def test_the_tokens_that_a_model_expects_are_kept_though_the_text_lacks_them(few: Path, tmp_path: Path) -> None:
    """The head answers one word that the text lacks whatever it has read."""
    source = llama(tmp_path / "source", tie_word_embeddings=False)
    model: Any = opening.load_model(source)
    word = int(load_tokenizer(source).convert_tokens_to_ids("Ġstone"))
    with torch.no_grad():
        model.model.norm.weight.fill_(0.01)
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 5.0
        model.lm_head.weight[word, 0] = 1000.0
    model.save_pretrained(source)
    pruned(PruneSpec.of(**SMALL, method="vocabulary", keep={"expected": 2}), source, few, tmp_path / "out")
    pruned(PruneSpec.of(**SMALL, method="vocabulary"), source, few, tmp_path / "text")
    assert "Ġstone" in load_tokenizer(tmp_path / "out").get_vocab()
    assert "Ġstone" not in load_tokenizer(tmp_path / "text").get_vocab()


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("text-classification", "keep.expected asks a model for tokens"),
        ("feature-extraction", "keep.expected asks a model for tokens"),
        ("fill-mask", None),
        ("text-generation", None),
    ],
)
def test_models_that_answer_no_tokens_are_asked_for_none(task: Task, told: str | None) -> None:
    refusal = PruneSpec.of(method="vocabulary", keep={"expected": 9}).refusal(Parent(task, "bert"))
    assert refusal is None if told is None else told in (refusal or "")


def test_a_file_of_tokens_is_read_into_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("Ġriver\nĠstone\n")
    spec = PruneSpec.of(method="vocabulary", keep={"tokens": str(tmp_path / "tokens.txt")})
    assert spec.model_dump(mode="json")["keep"]["tokens"] == ["Ġriver", "Ġstone"]
    assert spec.finetune is None


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        ({"text": False}, "keep names no tokens"),
        ({"scripts": ["latim"]}, "did you mean .latin"),
        ({"tokens": "nowhere.txt"}, "cannot read the tokens"),
        ("words", "keep"),
    ],
)
def test_what_names_no_tokens_is_refused(keep: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PruneSpec.of(method="vocabulary", keep=keep)


def test_what_cannot_be_kept_or_judged_is_refused(few: Path, tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    with pytest.raises(RecipeError, match="no 'riwer', and 1 of 1"):
        pruned(PruneSpec.of(**SMALL, method="vocabulary", keep={"tokens": ["riwer"]}), source, few, tmp_path / "unknown")
    write_documents(tmp_path / "rivers", [Document("0", "The river. " * 40)])
    with pytest.raises(StageError, match="every block"):
        few_tokens = {"text": False, "tokens": ["Ġstone"]}
        pruned(PruneSpec.of(**SMALL, method="vocabulary", keep=few_tokens), source, tmp_path / "rivers", tmp_path / "unjudged")


def test_tokenizers_of_their_own_files_and_students_are_refused_in_the_plan() -> None:
    spec = PruneSpec.of(method="vocabulary")
    facts = CheckpointFacts(
        Values({"class": "MarianConfig", "values": {"model_type": "marian"}, "names": {}}), tokenizer="MarianTokenizer"
    )
    parent = Parent("text2text-generation", "marian", facts=facts)
    assert "MarianTokenizer + vocabulary" in (spec.refusal(parent) or "")
    assert "has its teacher's tokenizer" in (DistillSpec(prune=spec).refusal(Parent("text-generation", "llama")) or "")


def test_the_stage_names_a_tokenizer_that_it_cannot_trim(few: Path, tmp_path: Path) -> None:
    source = slow_checkpoint("m2m_100", tmp_path / "source")
    with pytest.raises(StageError, match="M2M100Tokenizer"):
        pruned(PruneSpec.of(**SMALL, method="vocabulary"), source, few, tmp_path / "out")
