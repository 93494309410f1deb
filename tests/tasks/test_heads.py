"""Encoders that answer by vectors or labels: loaded with the head that they have, and served as the libraries that made them do."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from featherweight.checkpoint.facts import read_facts
from featherweight.checkpoint.opening import load_config, load_model
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError
from featherweight.model.architecture import task_of
from featherweight.runtimes import answer_parity
from featherweight.runtimes.candidate import Candidate
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.spec import Task
from featherweight.text.documents import Document, write_documents
from tasks.load import load
from tests.support import heads
from tests.support.families import family_checkpoint
from tests.support.heads import TEXTS, loaded, opened_vectors, tokens
from tests.support.in_process import InProcess
from tests.support.serving_models import exported, opened, serving_spec

pytestmark = pytest.mark.slow

MADE: dict[str, tuple[Task, Any, dict[str, Any]]] = {
    "vectors": ("feature-extraction", None, {}),
    "labels": ("text-classification", heads.labelled, {"num_labels": 2}),
    "pairs": ("text-classification", heads.paired, {"num_labels": 1}),
    "tags": ("token-classification", heads.tagged, {}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A loaded checkpoint of each kind, made once; what has labels is trained for a moment."""

    @cache
    def get(kind: str, model_type: str = "bert") -> Path:
        task, documents, changes = MADE[kind]
        folder = tmp_path_factory.mktemp(kind)
        made = heads.head_checkpoint(model_type, task, folder / "made", documents and documents(200), **changes)
        if kind == "vectors":
            heads.sentence_files(made)
        return loaded(made, folder / "loaded", task)

    return get


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Held-out documents of each kind."""

    @cache
    def get(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("text") / kind
        documents = MADE[kind][1]
        plain = [Document(str(place), one) for place, one in enumerate(TEXTS * 3)]
        write_documents(folder, documents(40, seed=1) if documents else plain)
        return folder

    return get


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_parity, "open_worker", InProcess)


def mean_vectors(folder: Path, texts: list[str]) -> Any:
    """What sentence-transformers makes of texts: transformers' own model, the mean of its tokens, at length 1, one by one."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    rows = []
    for one in texts:
        given = tokenizer(one, truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            rows.append(torch.nn.functional.normalize(model(**given).last_hidden_state.mean(1), dim=-1)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("kind", MADE)
def test_the_head_of_the_checkpoint_says_what_it_is_for(checkpoint: Any, tmp_path: Path, kind: str) -> None:
    task = MADE[kind][0]
    wrong: Task = "fill-mask"
    assert task_of(load_config(checkpoint(kind))) == task
    with pytest.raises(CheckpointError, match=f"is a model for {task} .*the recipe's task is {wrong}; set task: {task}"):
        load(LoadSpec(source=str(checkpoint(kind)), task=wrong), out=tmp_path)


def test_what_the_file_holds_counts_and_not_the_class_that_the_config_names(checkpoint: Any, tmp_path: Path) -> None:
    for name in ("BertForMaskedLM", "BertForPreTraining"):
        source = Path(shutil.copytree(checkpoint("vectors"), tmp_path / name))
        (source / "modules.json").unlink()
        config = json.loads((source / "config.json").read_text())
        config.pop("sentence_embedding")
        (source / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
        out = loaded(source, tmp_path / f"{name}-out", "feature-extraction")
        told = json.loads((out / "config.json").read_text())
        assert told["architectures"] == ["BertModel"] and told["sentence_embedding"]["pooling"] == ["mean"]
        assert not told["sentence_embedding"]["normalize"]


def test_a_whole_masked_model_beside_the_files_of_sentence_transformers_makes_vectors(tmp_path: Path) -> None:
    from tests.support.families import family_checkpoint

    source = heads.sentence_files(family_checkpoint("bert", tmp_path / "made"))
    out = loaded(source, tmp_path / "out", "feature-extraction")
    assert task_of(load_config(out)) == "feature-extraction"
    ours, theirs = opened_vectors(out), mean_vectors(source, TEXTS)
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("module", "wrong"),
    [("LSTM", "go through sentence-transformers' LSTM module"), ("Pooling", "pooling 'strange' is not known here")],
)
def test_what_is_not_known_of_the_files_is_refused(tmp_path: Path, module: str, wrong: str) -> None:
    source = heads.sentence_files(heads.head_checkpoint("bert", "feature-extraction", tmp_path / "made"))
    if module == "LSTM":
        kinds = [
            *json.loads((source / "modules.json").read_text()),
            {"path": "3_LSTM", "type": "sentence_transformers.models.LSTM"},
        ]
        (source / "modules.json").write_text(json.dumps(kinds))
    else:
        (source / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_strange": True}))
    with pytest.raises(CheckpointError, match=wrong):
        loaded(source, tmp_path / "out", "feature-extraction")


def test_the_encoder_of_an_encoder_decoder_is_not_taken_alone(tmp_path: Path) -> None:
    from tests.support.families import family_checkpoint

    source = heads.sentence_files(family_checkpoint("t5", tmp_path / "made"))
    config = json.loads((source / "config.json").read_text()) | {"architectures": ["T5EncoderModel"], "is_encoder_decoder": False}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"the encoder of an encoder-decoder alone \(T5EncoderModel\), which is not taken"):
        loaded(source, tmp_path / "out", "feature-extraction")


@pytest.mark.parametrize("headed", [True, False])
def test_a_decoder_makes_vectors_where_its_files_say_how(tmp_path: Path, headed: bool) -> None:
    """As Qwen3-Embedding: whatever class the config names; the last token's state, of texts that are padded together."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from tests.support.families import family_checkpoint

    source = heads.sentence_files(family_checkpoint("qwen3", tmp_path / "made"), pooling_mode_lasttoken=True)
    if not headed:
        AutoModel.from_pretrained(source).save_pretrained(source)
    facts = read_facts(LoadSpec(source=str(source), task="feature-extraction"))
    assert facts.task == "feature-extraction"
    refusal = Candidate(facts, 24).refusal(RUNTIMES["ctranslate2"], serving_spec(engine="ctranslate2"))
    assert "is a decoder; take " in str(refusal)
    out = loaded(source, tmp_path / "out", "feature-extraction")
    model, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        states = [model(**tokenizer(one, truncation=True, max_length=24, return_tensors="pt")).last_hidden_state for one in TEXTS]
    right = torch.nn.functional.normalize(torch.stack([state[0, -1] for state in states]), dim=-1)
    assert (opened_vectors(out) - right).abs().max() < 1e-5


def test_a_head_that_is_not_taken_is_named(tmp_path: Path) -> None:
    source = heads.head_checkpoint("bert", "feature-extraction", tmp_path / "made")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["BertForQuestionAnswering"]}))
    with pytest.raises(CheckpointError, match=r"its head \(BertForQuestionAnswering\) answers for no task that is known here"):
        loaded(source, tmp_path / "out", "feature-extraction")


def test_a_head_that_is_not_taken_is_named_in_the_plan_before_its_tensors(tmp_path: Path) -> None:
    source = family_checkpoint("bart", tmp_path / "made")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["BartForSequenceClassification"]}))
    with pytest.raises(CheckpointError, match=r"it labels texts with an encoder-decoder \(BartForSequenceClassification\)"):
        read_facts(LoadSpec(source=str(source)))


@pytest.mark.parametrize("pooling", ["cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"])
def test_tokens_are_pooled_as_the_files_say(tmp_path: Path, pooling: str) -> None:
    """Against the formulas of sentence-transformers, on a text that is padded and on one that is not."""
    import torch

    source = heads.head_checkpoint("bert", "feature-extraction", tmp_path / "made")
    heads.sentence_files(source, normalize=False, **{f"pooling_mode_{pooling}": True})
    out = loaded(source, tmp_path / "out", "feature-extraction")
    ours = opened_vectors(out)
    model, (ids, _) = load_model(out).eval(), tokens(out, TEXTS)
    for row, one in zip(ours, ids, strict=True):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([one])).last_hidden_state[0]
        places = torch.arange(1, len(one) + 1.0)[:, None]
        right = {
            "cls_token": hidden[0],
            "max_tokens": hidden.amax(0),
            "mean_sqrt_len_tokens": hidden.sum(0) / len(one) ** 0.5,
            "weightedmean_tokens": (hidden * places).sum(0) / places.sum(),
            "lasttoken": hidden[-1],
        }[pooling]
        assert torch.allclose(row, right, atol=1e-5)


@pytest.mark.parametrize("engine", ["torch", "torch-dynamic", "torchao-int8", "ctranslate2"])
@pytest.mark.parametrize("kind", MADE)
def test_several_texts_at_once_are_answered_as_each_alone(
    checkpoint: Any, text: Any, tmp_path: Path, kind: str, engine: str, in_process: None
) -> None:
    """And parity holds, to the served length, with other texts and lengths than these.

    torch-dynamic rounds all tokens of a batch by one range, which is that of a text alone but for some of a step.
    """
    import torch

    served, metrics = exported(checkpoint(kind), text(kind), tmp_path / "served", engine=engine)
    if engine != "torch":
        assert metrics["parity_mean_abs"] < metrics["parity_bound"]
        assert metrics.get("parity_weights_max_abs", 0.0) < 1e-3
    texts = [(one, "the wolf met") for one in TEXTS] if kind == "pairs" else TEXTS
    ids, types = tokens(served, texts)
    together, alone = opened(served).outputs(ids, types), opened(served, batch=1).outputs(ids, types)
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=0.02 if engine == "torch-dynamic" else 1e-5)


TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("model_type", ["convbert", "fnet", "mobilebert", "nystromformer"])
def test_texts_are_not_padded_where_a_model_sees_padding(model_type: str) -> None:
    """transformers' own answers to a text alone; beside a longer one its masked padding changes them."""
    import torch
    from transformers import AutoConfig, AutoModel

    from featherweight.runtimes.batched import answered
    from featherweight.text.examples import packed_inputs

    bottleneck = {"intra_bottleneck_size": 32, "num_feedforward_networks": 1} if model_type == "mobilebert" else {}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **TINY | bottleneck, architectures=["Model"])).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    ids = [[7, 8, 9], [7, 8, 9, 10, 11, 12, 13], [9, 8, 7]]

    def read(rows: list[list[int]], types: list[list[int]]) -> Any:
        inputs = packed_inputs(model.config, rows, types)
        known = {"input_ids", "token_type_ids"} if model_type == "fnet" else inputs
        with torch.no_grad():
            return model(**{name: tensor for name, tensor in inputs.items() if name in known}).last_hidden_state

    types = [[0] * len(row) for row in ids]
    together = answered(model.config, 8, ids, types, lambda rows, types: read(rows, types)[:, :3])
    for ours, row in zip(together, ids, strict=True):
        assert torch.allclose(torch.tensor(ours), read([row], [[0] * len(row)])[0, :3], atol=1e-6)
    assert not torch.allclose(read(ids, types)[0, :3], read(ids[:1], types[:1])[0], atol=1e-3)


@pytest.mark.parametrize("model_type", ["layoutlm", "squeezebert"])
def test_what_is_pooled_without_being_asked_for_is_left_out(model_type: str) -> None:
    import torch
    from transformers import AutoConfig

    from featherweight.model.architecture import auto_class

    config = AutoConfig.for_model(model_type, **TINY, architectures=["Model"])
    with torch.no_grad():
        found = auto_class(config).from_config(config)(input_ids=torch.tensor([[7, 8, 9]]))
    assert found.last_hidden_state.shape == (1, 3, 32)


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ({"id2label": {1: "bad", 2: "good"}}, "id2label names the labels 1, 2, and there are 0 to 1"),
        ({"num_labels": 1, "sbert_ce_default_activation_function": "torch.nn.Tanh"}, "its scores go through torch.nn.Tanh"),
        ({"num_labels": 1, "sentence_transformers": {"activation_fn": "own.Identity"}}, "its scores go through own.Identity"),
    ],
)
def test_labels_that_cannot_be_answered_are_told_by_the_config(told: dict[str, Any], wrong: str) -> None:
    from transformers import BertConfig

    from featherweight.model.architecture import head_refusal

    assert wrong in str(head_refusal(BertConfig(architectures=["BertForSequenceClassification"], **told)))


def test_a_scale_that_is_wrong_fails_parity(checkpoint: Any, text: Any, tmp_path: Path, in_process: None) -> None:
    from featherweight.errors import ParityError
    from featherweight.runtimes.answer_parity import AnswerReference
    from featherweight.runtimes.bounds import EXACT

    for kind in MADE:
        model = load_model(checkpoint(kind)).eval()
        reference = AnswerReference.of(model, checkpoint(kind), text(kind))
        assert reference.hold_twin(model, EXACT, "itself")["parity_max_abs"] < 1e-5
        model.base_model.encoder.layer[1].output.dense.weight.data *= 1.05
        with pytest.raises(ParityError, match="does not compute what its PyTorch source computes"):
            reference.hold_twin(model, EXACT, "another")
    assert tmp_path


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "distilbert"])
def test_ctranslate2_holds_the_encoder_and_the_head_stands_behind_it(
    checkpoint: Any, text: Any, tmp_path: Path, kind: str, model_type: str, in_process: None
) -> None:
    spec = {"engine": "ctranslate2", "compute_type": "int8_float32"}
    _, metrics = exported(checkpoint(kind, model_type), text(kind), tmp_path / "served", **spec)
    assert metrics["parity_max_abs"] < metrics["parity_bound"] == 1e-3
