"""What a scoring server of MLflow's reads for our models: every form of a request, whole, or the reason why not."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow.pyfunc.scoring_server as server
import pandas
import pytest
from mlflow.pyfunc import load_model, save_model
from starlette.testclient import TestClient

from featherweight.errors import DataError
from featherweight.registry.serving import scoring
from featherweight.registry.serving.scoring import CSV, JSON, PARQUET, Guarded, guard, readable

TEXTS = ["Once upon a time", 'It was "heavy", and']


@pytest.fixture
def mlflows(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """MLflow's module as it comes, put back afterwards."""
    found = server.invocations
    while isinstance(found, Guarded):
        found = found._invocations
    monkeypatch.setattr(server, "invocations", found)
    yield server


def parquet(frame: pandas.DataFrame) -> bytes:
    packed = io.BytesIO()
    frame.to_parquet(packed)
    return packed.getvalue()


def table(columns: list[str], *rows: list[Any]) -> tuple[dict[str, Any], str]:
    return {"dataframe_split": {"columns": columns, "data": list(rows)}}, JSON


@pytest.mark.parametrize("index", [False, True])
def test_a_file_of_pandas_is_a_table_of_texts(index: bool) -> None:
    frame = pandas.DataFrame({"prompt": TEXTS}, index=["a", "b"])
    found = table(["prompt"], *([text] for text in TEXTS))
    assert readable(frame.to_csv(index=index).encode(), CSV) == found
    assert readable(parquet(frame if index else frame.reset_index(drop=True)), PARQUET) == found


def test_what_a_csv_file_holds_is_text() -> None:
    held = b'\xef\xbb\xbftext,text_pair\r\n123,NA\r\n\r\n,"a\nb"\r\n'
    assert readable(held, "Text/CSV; charset=UTF-8") == (
        table(["text", "text_pair"], ["123", "NA"], ["", "a\nb"])[0],
        f"{JSON}; charset=utf-8",
    )


def test_a_conversation_in_parquet_stays_one() -> None:
    talk = [{"role": "user", "content": "Once"}, {"role": "user", "content": "upon"}]
    assert readable(parquet(pandas.DataFrame({"messages": [talk]})), PARQUET) == table(["messages"], [talk])


def test_json_and_what_comes_without_a_type_is_read_once() -> None:
    asked = {"inputs": TEXTS, "params": {"max_new_tokens": 3}}
    assert readable(json.dumps(asked).encode(), None) == (asked, JSON)
    assert readable(b"x", "a/b; c=d") == (b"x", "a/b; c=d")  # MLflow refuses it


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (b"", JSON, "the request is no JSON"),
        (b"\xff", JSON, "the request is no JSON"),
        (b"[" * 100_000, JSON, "the request is no JSON"),
        (b'{"inputs": ' + b"9" * 5000 + b"}", JSON, "the request is no JSON"),
        (b"[]", JSON, "the request is no object"),
        (b"{}", JSON, "a request has one of inputs"),
        (b'{"inputs": [], "instances": []}', JSON, "a request has one of inputs"),
        (
            b'{"inputs": ["a"], "max_new_tokens": 3}',
            JSON,
            "'max_new_tokens' stands beside the texts; parameters stand under 'params'",
        ),
        (b'{"inputs": [' + b"0," * 10_000 + b"0]}", JSON, "10001 values beside each other in one request; send at most 10000"),
        (b"", CSV, "the CSV is empty"),
        (b"\xff", CSV, "the request is no CSV: 'utf-8' codec"),
        (b'a\n"x', CSV, "the request is no CSV"),
        (b"a,b\n1\n", CSV, "row 1 of the CSV has another number of values, 1, than its head, 2"),
        (b"," * 20_000, CSV, "20000 values beside each other"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_reason(data: bytes, kind: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"^{reason}"):
        readable(data, kind)


@pytest.mark.parametrize("rows", [10_001, 40])
def test_a_parquet_file_is_not_unpacked_beyond_what_a_request_holds(rows: int) -> None:
    packed = parquet(pandas.DataFrame({"prompt": ["x" * 2**20 if rows == 40 else "x"] * rows}))
    assert len(packed) < 2**17
    with pytest.raises(DataError, match="send at most 10000 rows and 32 MiB"):
        readable(packed, PARQUET)


def test_models_of_others_are_answered_as_before(mlflows: ModuleType, tmp_path: Path) -> None:
    code = tmp_path / "model.py"
    code.write_text(
        "import mlflow\nclass Echo(mlflow.pyfunc.PythonModel):\n    def predict(self, context, model_input):\n"
        "        return list(model_input)\nmlflow.models.set_model(Echo())\n"
    )
    save_model(str(tmp_path / "echo"), python_model=str(code), pip_requirements=[])
    before = TestClient(server.init(load_model(str(tmp_path / "echo"))))
    asked = [{"inputs": ["a"], "x": 1}, {"inputs": []}, []]
    answers = [before.post("/invocations", json=one) for one in asked]
    guard()
    assert isinstance(server.invocations, Guarded)
    guard()
    assert not isinstance(server.invocations._invocations, Guarded)
    assert [(one.status_code, one.text) for one in answers] == [
        (one.status_code, one.text) for one in (before.post("/invocations", json=one) for one in asked)
    ]


def test_an_mlflow_that_reads_otherwise_is_left_alone_and_named(
    mlflows: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def invocations(request: object) -> None:
        """Of another MLflow."""

    monkeypatch.setattr(server, "invocations", invocations)
    with caplog.at_level(logging.WARNING, logger=scoring.__name__):
        guard()
    assert server.invocations is invocations and "serve by `featherweight serve`" in caplog.text


def test_a_process_that_serves_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(scoring.sys.modules, scoring.SERVER)
    guard()
    assert scoring.SERVER not in scoring.sys.modules


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (["text", "text_pair"], "text and text_pair are two texts; this model reads one of each row"),
        (["prompt", "adapter"], "'adapter' stands in a column beside the texts; parameters stand under 'params', for all rows"),
    ],
)
def test_columns_that_an_answer_would_depend_on_are_not_left_out(columns: list[str], reason: str) -> None:
    from featherweight.registry.serving.strict import _one_column

    frame = pandas.DataFrame([["a", "b"]], columns=columns)
    for given in (frame, frame.to_dict("list"), frame.to_dict("records")):
        with pytest.raises(DataError, match=f"^{reason}$"):
            _one_column(given, ["max_new_tokens", "adapter"])
    assert _one_column(pandas.DataFrame([[7, "a"]], columns=["id", "text"]), ["adapter"]).to_dict("list") == {"text": ["a"]}
