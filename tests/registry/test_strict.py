"""What is asked of a model of ours through MLflow's own `predict` is taken whole, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pandas
import pytest
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel, load_model, save_model

from featherweight.registry.answering import signature
from featherweight.registry.generator import prompts_of
from featherweight.registry.labeller import texts_of
from featherweight.registry.serving.scoring import guard
from featherweight.registry.serving.strict import MARK, Strict
from featherweight.spec import Task

ECHO = """
import mlflow
class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return [model_input, params]
mlflow.models.set_model(Echo())
"""
TALK = [{"role": "user", "content": "The river"}]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """A model that gives back what it is asked, with the signature of a task; of ours, or of others."""
    folder, before = tmp_path_factory.mktemp("echo"), PyFuncModel.predict
    (folder / "model.py").write_text(ECHO)

    def made(task: Task, mine: bool = True) -> Any:
        path = folder / f"{task}-{mine}"
        if not path.exists():
            metadata = {MARK: "torch"} if mine else {}
            code = str(folder / "model.py")
            save_model(str(path), python_model=code, pip_requirements=[], metadata=metadata, signature=signature(task))
        return load_model(str(path))

    guard()
    yield made
    PyFuncModel.predict = before  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("asked", "params", "reason"),
    [
        (["a"], {"temperature": 0.5}, "no parameter 'temperature'; known: max_new_tokens, stop_at_end, adapter"),
        ({"messages": TALK, "temperature": 1}, None, "no parameter 'temperature'"),
        ({"prompt": "a", "max_tokens": 3}, None, "no parameter 'max_tokens'; did you mean 'max_new_tokens'"),
        (pandas.DataFrame({"prompt": ["a"], "max_new_tokens": [2]}), None, "'max_new_tokens' stands in a column beside the texts"),
        (pandas.DataFrame({"id": ["x"], "question": ["a"]}), None, "none of 2 columns is called as texts are"),
        (TALK, None, "a conversation stands under 'messages', as one list"),
    ],
)
def test_what_mlflow_would_leave_out_is_refused_by_name(load: Callable[..., Any], asked: Any, params: Any, reason: str) -> None:
    with pytest.raises(MlflowException, match=reason):
        load("text-generation").predict(asked, params=params)


def test_the_column_of_the_texts_is_taken_wherever_it_stands(load: Callable[..., Any]) -> None:
    model = load("text-generation")
    for asked in (pandas.DataFrame({"id": ["x", "y"], "prompt": ["a", "b"]}), [{"id": "x", "prompt": "a"}, {"prompt": "b"}]):
        assert prompts_of(model.predict(asked)[0]) == ["a", "b"]
    assert prompts_of(model.predict([TALK, TALK])[0]) == [TALK, TALK]
    for asked in (numpy.array(["a", "b"]), {"prompt": ["a", "b"]}, {"input": ["a", "b"], "model": "x"}):
        assert prompts_of(model.predict(asked)[0]) == ["a", "b"]
    assert prompts_of({"input": ["a", "b"]}) == ["a", "b"] and prompts_of({"input": "a"}) == ["a"]


def test_parameters_beside_a_prompt_are_followed(load: Callable[..., Any]) -> None:
    model = load("text-generation")
    told, params = model.predict({"prompt": "a", "max_new_tokens": 2, "model": "x"}, {"adapter": "y"})
    assert prompts_of(told) == ["a"] and (params["max_new_tokens"], params["adapter"]) == (2, "y")


def test_a_second_text_is_not_lost_on_a_model_of_vectors(load: Callable[..., Any]) -> None:
    model, pair = load("feature-extraction"), {"text": ["a"], "text_pair": ["b"]}
    for asked in (pandas.DataFrame(pair), pair, [{"text": "a", "text_pair": "b"}]):
        with pytest.raises(MlflowException, match="text and text_pair are two texts; this model reads one of each row"):
            model.predict(asked)
    for asked in ([("a", "b")], [["a", "b"]], numpy.array([["a", "b"]])):
        assert [list(one) for one in texts_of(model.predict(asked)[0])] == [["a", "b"]]  # which is refused as a pair
    assert texts_of(model.predict({"text": ["a", "b"]})[0]) == ["a", "b"]
    assert texts_of(load("text-classification").predict(pandas.DataFrame(pair))[0]) == [("a", "b")]


def test_models_of_others_are_asked_as_before(load: Callable[..., Any]) -> None:
    guard()
    assert isinstance(PyFuncModel.predict, Strict) and not isinstance(PyFuncModel.predict._predict, Strict)
    told, params = load("text-generation", mine=False).predict(pandas.DataFrame({"id": ["x"], "prompt": ["a"]}), {"other": 1})
    assert prompts_of(told) == ["x"] and "other" not in params
