"""The served model's vectors, labels and entities against transformers' own pipelines, in the signature of its task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest

from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import DataError
from featherweight.measure.batching import Batching
from featherweight.registry import served_engine
from featherweight.registry.answering import signature
from featherweight.registry.generator import prompts_of
from featherweight.registry.labeller import Labeller, _parts, scored, texts_of
from featherweight.store.served_folder import Serving
from tasks.load import load
from tests.support import heads
from tests.support.in_process import InProcess

TEXTS = ["the fox sang", "once upon a time there was a bear fox and a wolf", "ran", "Hare, the old"]
MADE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "vectors": ("feature-extraction", None, {}),
    "labels": ("text-classification", heads.labelled, {"num_labels": 2}),
    "several": ("text-classification", None, {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "pairs": ("text-classification", heads.paired, {"num_labels": 1}),
    "tags": ("token-classification", heads.tagged, {}),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def get(kind: str) -> Path:
        task, documents, changes = MADE[kind]
        folder = tmp_path_factory.mktemp(kind)
        made = heads.head_checkpoint("bert", task, folder / "made", documents and documents(200), **changes)
        if kind == "vectors":
            heads.sentence_files(made)
        (folder / "served").mkdir()
        load(LoadSpec(source=str(made), task=task), out=folder / "served")
        Serving("torch").write(folder / "served")
        return folder / "served"

    return get


@pytest.fixture
def opened(served: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(served_engine, "open_worker", InProcess)
    yield lambda kind: Labeller(served(kind), max_tokens=64)


def pipeline(folder: Path, task: str, **options: Any) -> Any:
    import transformers

    made: Any = transformers.pipeline
    kind = {"text-classification": "SequenceClassification", "token-classification": "TokenClassification"}[task]
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder)
    return made(task, model=model, tokenizer=transformers.AutoTokenizer.from_pretrained(folder), **options)


def test_vectors_are_cut_and_pooled_as_the_files_say(served: Any, opened: Any) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder, answer = served("vectors"), opened("vectors")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    texts = [*TEXTS, "the old river " * 20]
    found = answer(texts)
    assert found.shape == (5, 32) and found.dtype == "float32"
    for row, text in zip(found, texts, strict=True):
        given = tokenizer(text, truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            right = torch.nn.functional.normalize(model(**given).last_hidden_state.mean(1), dim=-1)[0]
        assert row == pytest.approx(right.numpy(), abs=1e-5)
    with pytest.raises(DataError, match="a text of 62 tokens"):
        Labeller(folder, max_tokens=32)(texts, truncate=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["labels", "several", "pairs"])
def test_labels_and_scores_are_those_of_the_pipeline(served: Any, opened: Any, kind: str) -> None:
    right = pipeline(served(kind), "text-classification", top_k=None)
    texts: list[Any] = [(one, "the fox ran") for one in TEXTS] if kind == "pairs" else list(TEXTS)
    found = opened(kind)(texts)
    for one, answer in zip(texts, found, strict=True):
        expected = right({"text": one[0], "text_pair": one[1]} if kind == "pairs" else [one])
        rows = expected if isinstance(expected[0], dict) else expected[0]
        scores = {row["label"]: row["score"] for row in rows}
        assert answer["scores"] == pytest.approx(scores, abs=1e-5)
        assert answer["score"] == max(answer["scores"].values()) == answer["scores"][answer["label"]]


@pytest.mark.engine
def test_texts_of_several_threads_are_answered_together_as_each_alone_and_at_set_times(served: Any) -> None:
    asked = [[text] for text in TEXTS] + [TEXTS * 3]
    labels = Labeller(served("labels"), max_tokens=64, max_batch=4, batch_window_s=0.01)
    alone = [labels(texts) for texts in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(labels, asked))
    assert [[row["label"] for row in rows] for rows in together] == [[row["label"] for row in rows] for rows in alone]
    for ours, right in zip(chain(*together), chain(*alone), strict=True):
        assert ours["scores"] == pytest.approx(right["scores"], abs=1e-5)
    with labels._running() as worker:
        assert worker.outputs([], []) == []
        came = [0.0, 0.001, 0.002]
        times = worker.under_load([[5, 6], [5], [7, 8, 9]], 0, came, 600.0, Batching(2, 0.01), headed=True)
        assert all(at <= first == last for at, (first, last) in zip(came, times, strict=True))
    labels.close()


@pytest.mark.slow
def test_a_trained_classifier_is_right(opened: Any) -> None:
    documents = heads.labelled(60, seed=2)
    found = opened("labels")([one.text for one in documents])
    right = sum(answer["label"] == f"LABEL_{one.label}" for one, answer in zip(documents, found, strict=True))
    assert right > 50
    documents = heads.tagged(20, seed=2)
    found = opened("tags")([one.text for one in documents])
    animals = [sum(word in heads.ANIMALS for word in one.text.split()) for one in documents]
    assert sum(len(one["word"].split()) for answer in found for one in answer) > 0.8 * sum(animals)


@pytest.mark.parametrize(("aggregate", "strategy"), [(True, "simple"), (False, "none")])
def test_entities_are_those_of_the_pipeline(served: Any, opened: Any, aggregate: bool, strategy: str) -> None:
    right = pipeline(served("tags"), "token-classification", aggregation_strategy=strategy)(TEXTS)
    found = opened("tags")(TEXTS, aggregate=aggregate)
    key = "entity_group" if aggregate else "entity"
    for text, ours, theirs in zip(TEXTS, found, right, strict=True):
        assert [(one["entity"], one["start"], one["end"]) for one in ours] == [
            (one[key], one["start"], one["end"]) for one in theirs
        ]
        assert [one["score"] for one in ours] == pytest.approx([float(one["score"]) for one in theirs], abs=1e-5)
        assert all(one["word"] == text[one["start"] : one["end"]] for one in ours)


@pytest.mark.parametrize("names", [("O", "S-ANIMAL", "E-ANIMAL"), ("O", "L-a-b", "U-a-b"), ("B-O", "b-ANIMAL", "I-ANIMAL")])
def test_entities_of_other_schemes_are_named_as_the_pipeline_names_them(served: Any, opened: Any, names: Any) -> None:
    right, ours = pipeline(served("tags"), "token-classification", aggregation_strategy="simple"), opened("tags")
    right.model.config.id2label = ours.config.id2label = dict(enumerate(names))
    for found, theirs in zip(ours(TEXTS), right(TEXTS), strict=True):
        assert [(one["entity"], one["start"], one["end"]) for one in found] == [
            (one["entity_group"], one["start"], one["end"]) for one in theirs
        ]


def test_what_is_no_text_is_refused(opened: Any) -> None:
    labels = opened("labels")
    for wrong in (3, None, {"pair": "a"}, ["a", "b", "c"], "half \ud83d"):
        with pytest.raises(DataError, match=r"give a text|half of a surrogate pair"):
            labels([wrong])
    for cut in (False, True):  # neither is cut into tokens first, which takes ten seconds
        with pytest.raises(DataError, match="a text of 10200000 characters"):
            labels(["light " * 1_700_000], truncate=cut)
    with pytest.raises(DataError, match="200000 texts in one request"):
        labels(["a"] * 200_000)
    with pytest.raises(DataError, match="two texts are asked of a model for token-classification"):
        opened("tags")([("a", "b")])
    with pytest.raises(DataError, match="tokens: this model is served for 64"):
        labels(["the river " * 40])
    assert labels([]) == [] and len(labels(["the river " * 40], truncate=True)) == 1


def test_a_text_is_cut_where_the_pipeline_cuts_it(served: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tokenizer's files may say less than the model has positions."""
    monkeypatch.setattr(served_engine, "open_worker", InProcess)
    folder = shutil.copytree(served("several"), tmp_path / "short")
    told = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 12}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    text = "the old hare sang and the fox ran once upon a time there was a bear and a wolf"
    (right,) = pipeline(folder, "text-classification")(text, truncation=True)
    labels = Labeller(folder, max_tokens=64)
    (found,) = labels([text], truncate=True)
    assert (found["label"], found["score"]) == (right["label"], pytest.approx(right["score"], abs=1e-6))
    assert found["score"] != pytest.approx(labels([text])[0]["score"], abs=1e-4)
    with pytest.raises(DataError, match=r"a text of 12 tokens: this model is served for 8; give less$"):
        Labeller(folder, max_tokens=8)([text], truncate=True)


def test_a_cross_encoder_without_activation_gives_its_logit(served: Any) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(served("pairs"))
    assert scored(config, [[0.0, 3.0]])["score"] == pytest.approx(0.9526, abs=1e-4)
    config.sbert_ce_default_activation_function = "torch.nn.modules.linear.Identity"
    assert scored(config, [[0.0, 3.0]])["score"] == 3.0


def test_a_pair_too_long_for_a_cross_encoder_is_cut_as_sentence_transformers_cuts_it(
    served: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`CrossEncoder.predict` does so without being asked, and transformers' pipeline does not."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    monkeypatch.setattr(served_engine, "open_worker", InProcess)
    folder = shutil.copytree(served("pairs"), tmp_path / "cross")
    for name, more in (
        ("tokenizer_config.json", {"model_max_length": 16}),
        ("config.json", {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | more))
    pair = ("the fox " * 20, "the old bear " * 20)
    told = AutoTokenizer.from_pretrained(folder)(*pair, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        right = AutoModelForSequenceClassification.from_pretrained(folder)(**told).logits.item()
    assert Labeller(folder, max_tokens=64)([pair])[0]["score"] == pytest.approx(right, abs=1e-5)
    with pytest.raises(DataError, match="this model is served for 64; give less, or truncate"):
        Labeller(folder, max_tokens=64)([pair], truncate=False)
    assert dict((one.name, one.default) for one in signature("text-classification").params)["truncate"] is None


def test_labels_that_share_a_name_keep_a_score_each(served: Any) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(served("labels"))
    config.id2label = {0: "same", 1: "same"}
    told = scored(config, [[0.0, 0.0]])
    assert told == {"label": "same", "score": 0.5, "scores": {"0 same": 0.5, "1 same": 0.5}}


def test_texts_come_in_every_shape_that_mlflow_gives() -> None:
    assert texts_of(["a", "b"]) == texts_of(pandas.DataFrame({0: ["a", "b"]})) == ["a", "b"]
    assert texts_of(pandas.DataFrame({"text": ["a"], "text_pair": ["b"]})) == [("a", "b")]
    assert texts_of({"text": "a"}) == [{"text": "a"}]
    assert texts_of(pandas.DataFrame({0: [["a", "b"]]})) == [["a", "b"]]


@pytest.mark.parametrize("task", ["feature-extraction", "text-classification", "token-classification"])
def test_texts_under_input_are_several_and_no_pair(task: Any) -> None:
    """A request as OpenAI's API has it: it was refused as a pair, or as no text."""
    from mlflow.pyfunc import _validate_prediction_input

    told = signature(task)
    for given in (["a", "b"], ["a", "b", "c"], "a"):
        assert texts_of(_validate_prediction_input({"input": given}, {}, told.inputs, told.params)[0]) == [*given]


def test_every_task_has_its_signature() -> None:
    for task, out in (("feature-extraction", "tensor"), ("text-classification", "any"), ("token-classification", "any")):
        told = signature(task).to_dict()  # type: ignore[arg-type]
        assert json.loads(told["outputs"])[0]["type"] == out
        assert "truncate" in told["params"]


def test_one_text_is_one_text_however_it_is_given() -> None:
    """Under `inputs` it comes as an array without dimensions; its characters are no texts."""
    from mlflow.pyfunc.scoring_server import infer_and_parse_data

    for given in ("the fox", numpy.array("the fox"), infer_and_parse_data({"inputs": "the fox"}, None)):
        assert texts_of(given) == ["the fox"]
    assert prompts_of("the fox") == ["the fox"]


def test_mlflow_hands_on_both_texts_of_a_pair() -> None:
    """As a caller gives them, and in every form that a request over HTTP may have; a schema of one column would keep the first."""
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import _validate_prediction_input
    from mlflow.pyfunc.scoring_server import infer_and_parse_data

    told: ModelSignature = signature("text-classification")
    row = {"text": "a", "text_pair": "b"}
    requests = ({"inputs": [["a", "b"]]}, {"inputs": [row]}, {"instances": [row]}, {"instances": [["a", "b"]]})
    requests += ({"dataframe_records": [row]}, {"dataframe_split": {"columns": ["text", "text_pair"], "data": [["a", "b"]]}})
    came: list[Any] = [[("a", "b")], [["a", "b"]], [row], row, pandas.DataFrame([row])]
    came += [infer_and_parse_data(dict(one), told.inputs) for one in requests]
    for given in came:
        (found,) = texts_of(_validate_prediction_input(given, {}, told.inputs, told.params)[0])
        assert _parts(found) == ("a", "b"), given


@pytest.mark.parametrize(
    "given",
    [
        pandas.DataFrame({"query": ["a"], "passage": ["b"]}),
        pandas.DataFrame({"text": ["a"], "passage": ["b"]}),
        {"text": ["a"], "passage": ["b"]},
        {"text": "a", "passage": "b"},
        [{"text": "a", "passage": "b"}],
    ],
)
def test_a_second_text_of_another_name_is_not_lost(given: Any) -> None:
    """A reranker scored the first of the two alone, and said nothing."""
    with pytest.raises(DataError, match=r"'passage' stands beside a text; two texts are called text and text_pair|call its texts"):
        [_parts(one) for one in texts_of(given)]
    numbered = pandas.DataFrame({"id": [7], "text": ["a"]})
    assert texts_of(numbered) == ["a"]
