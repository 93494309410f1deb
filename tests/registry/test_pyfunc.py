"""The champion answers: loaded by MLflow, and served by it over HTTP, whichever engine won."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mlflow.exceptions import MlflowException
from starlette.testclient import TestClient

from featherweight.errors import DataError, StageError
from featherweight.registry.generator import Generator, prompts_of
from featherweight.registry.lineage import build
from featherweight.registry.serving.scoring import CSV, JSON, PARQUET
from featherweight.store.artifact import Manifest
from featherweight.store.served_folder import Serving
from featherweight.system.processes import end_group, held_port
from featherweight.system.servers import await_url
from featherweight.text.documents import Document, write_documents
from tests.support.paths import ROOT
from tests.support.registering import METRICS, MODEL, Bench, bench
from tests.support.serving_models import NEW, PROMPTS, serving_spec, written
from tests.support.waiting import all_end, running

pytestmark = pytest.mark.slow

TEMPLATE = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
TALK = [{"role": "user", "content": "Once upon"}, {"role": "user", "content": "a time"}]
TOLD = "user: Once upon user: a time "


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("pyfunc"))


def torch_folder(checkpoint: Path, out: Path, _text: Path) -> None:
    shutil.copytree(checkpoint, out, dirs_exist_ok=True)
    (out / "chat_template.jinja").write_text(TEMPLATE)
    Serving("torch").write(out)


def ctranslate2_folder(checkpoint: Path, out: Path, text: Path) -> None:
    from tasks.export import export

    export(serving_spec(engine="ctranslate2"), checkpoint=checkpoint, calibration=text, out=out)


def genai_folder(checkpoint: Path, out: Path, text: Path) -> None:
    from tasks.compile import compile

    compile(serving_spec(engine="onnxruntime-genai"), checkpoint=checkpoint, calibration=text, out=out)


def promote(desk: Bench, tiny_checkpoint: Path, name: str, make: Callable[[Path, Path, Path], None]) -> str:
    """Register a served folder of that engine as the champion of a model of its own; returns the model's name."""
    out, text = desk.root / name, desk.root / f"{name}-text"
    out.mkdir()
    write_documents(text, [Document(str(i), "It was heavy, and it wanted to be light. " * 40) for i in range(4)])
    make(tiny_checkpoint, out, text)
    ref, manifest = desk.publish(out, name)
    graph = build([(ref, manifest)], ref.digest, variant=name, recipe="", run_id=desk.run_id, metrics=METRICS)
    winner = replace(desk.record(name, ref, graph), model=f"{MODEL}-{name}", max_tokens=128)
    desk.registry.register(winner)
    desk.registry.transition(winner.model, "1", "production", who="ada", why="a test")
    return winner.model


@pytest.fixture(scope="module")
def torch_model(desk: Bench, tiny_checkpoint: Path) -> str:
    return promote(desk, tiny_checkpoint, "torch", torch_folder)


@pytest.fixture
def load(desk: Bench) -> Iterator[Callable[..., Any]]:
    """Loads `models:/NAME@champion` as a user would, with MLflow's global URI, which is put back."""
    import mlflow

    mlflow.set_tracking_uri(desk.registry.tracking_uri)
    yield lambda model, **options: mlflow.pyfunc.load_model(f"models:/{model}@champion", **options)
    mlflow.set_tracking_uri(None)


def workers(of: psutil.Process | None = None) -> list[psutil.Process]:
    """Engine processes below this one."""
    return running("featherweight.runtimes.worker", of)


ENGINES = {"torch": torch_folder, "ctranslate2": ctranslate2_folder, "onnxruntime-genai": genai_folder}


@pytest.mark.engine
@pytest.mark.parametrize("engine", ENGINES)
def test_champion_of_every_engine_answers(desk: Bench, tiny_checkpoint: Path, load: Callable[..., Any], engine: str) -> None:
    name = promote(desk, tiny_checkpoint, f"every-{engine}", ENGINES[engine])
    model = load(name)
    answers = model.predict(PROMPTS, params={"max_new_tokens": NEW, "stop_at_end": False})
    assert answers == [written(tiny_checkpoint, prompt, NEW) for prompt in PROMPTS]
    assert desk.registry.champion(name).tag("engine") == engine


@pytest.mark.engine
def test_data_frames_and_defaults_work_and_the_engine_ends_with_its_model(torch_model: str, load: Callable[..., Any]) -> None:
    import pandas

    gc.collect()
    before = set(workers())
    model = load(torch_model)
    (engine,) = set(workers()) - before
    params = {"max_new_tokens": NEW}
    assert model.predict(pandas.DataFrame({"prompt": PROMPTS}), params=params) == model.predict(PROMPTS, params=params)
    assert model.input_example == ["Once upon a time"]
    assert model.predict({"prompt": PROMPTS[0], "model": "x"}, params) == model.predict(PROMPTS[:1], params=params)
    for data, told in ((PROMPTS, {"temperature": 0.7}), ({"prompt": PROMPTS[0], "temperature": 0.7}, params)):
        with pytest.raises(MlflowException, match="no parameter 'temperature'; known: max_new_tokens, stop_at_end, adapter"):
            model.predict(data, told)
    (answer,) = model.predict(model.input_example)
    assert len(answer) > len(model.predict(model.input_example, params=params)[0])
    assert [(one.name, one.default) for one in model.metadata.signature.params] == [
        ("max_new_tokens", None),
        ("stop_at_end", True),
        ("adapter", None),
    ]
    del model
    gc.collect()
    assert not engine.is_running()


FRAME = {"columns": ["id", "prompt"], "data": [["7", PROMPTS[0]]]}
RIGHT: list[tuple[bytes, str | None]] = [
    *(
        (json.dumps({**form, "params": {"max_new_tokens": NEW}}).encode(), JSON)
        for form in (
            {"inputs": PROMPTS[:1]},
            {"instances": PROMPTS[:1]},
            {"dataframe_split": FRAME},
            {"dataframe_records": [{"id": 7, "prompt": PROMPTS[0]}]},
        )
    ),
    (json.dumps({"model": "x", "prompt": PROMPTS[0], "max_new_tokens": NEW}).encode(), None),
    (json.dumps({"prompt": PROMPTS[:1], "max_new_tokens": NEW}).encode(), "Application/JSON; charset=UTF-8"),
    (f"prompt\n{PROMPTS[0]}\n".encode(), CSV),
    (f",prompt\n0,{PROMPTS[0]}\n".encode(), CSV),
]
WRONG: list[tuple[bytes, str, str]] = [
    (b"", JSON, "the request is no JSON"),
    (b"PAR1" * 30, PARQUET, "the request cannot be read: Arrow"),
    (b"{}", "a/b", "only supports the following content types"),
    (b'{"inputs": ["a"]}', f"{JSON}; charset=latin-1", "only supports UTF-8"),
    *(
        (json.dumps(form).encode(), JSON, why)
        for form, why in (
            ({"inputs": [["a", "b"], ["c"]]}, "a prompt is a text, or a conversation"),
            ({"inputs": [{"role": "user", "content": "a"}]}, "a conversation stands under 'messages', as one list"),
            ({"inputs": {"prompt": "a"}}, "Failed to parse input data"),
            ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "messages and prompt both hold texts"),
            ({"messages": "a"}, "messages are conversations"),
            ({"prompt": "a", "temperature": 1}, "no parameter 'temperature'; known"),
            ({"inputs": ["a"], "params": {"max_new_token": 1}}, "no parameter 'max_new_token'; did you mean 'max_new_tokens'"),
            ({"inputs": ["a"], "params": {"max_new_tokens": "x"}}, "Failed to validate type and shape for 'max_new_tokens'"),
            ({"inputs": ["a"], "params": [1]}, "arameters"),
            ({"dataframe_split": {"data": 1}}, "not a valid dataframe representation"),
        )
    ),
]


@pytest.mark.engine
def test_mlflows_scoring_server_of_our_model_tells_reasons(
    torch_model: str, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.pyfunc import scoring_server

    monkeypatch.setattr(scoring_server, "invocations", scoring_server.invocations)  # put back afterwards
    model = load(torch_model)
    client = TestClient(scoring_server.init(model), raise_server_exceptions=False)
    for data, kind in RIGHT:
        answer = client.post("/invocations", content=data, headers={"content-type": kind} if kind else {})
        assert answer.status_code == 200, (data, answer.text)
        found = answer.json()
        new = NEW if kind != CSV else None
        expected = model.predict(PROMPTS[:1], params={"max_new_tokens": new} if new else None)
        assert (found if isinstance(found, list) else found["predictions"]) == expected, data
    for data, kind, why in WRONG:
        answer = client.post("/invocations", content=data, headers={"content-type": kind})
        assert answer.status_code in (400, 415) and why in answer.json()["message"], (data, answer.text)
        assert answer.json().keys() == {"error_code", "message"} and "site-packages" not in answer.text, answer.text


def test_model_says_what_it_needs(desk: Bench, torch_model: str) -> None:
    import torch

    served = desk.registry.served_folder(desk.registry.get(torch_model, "champion"), desk.root)
    lines = (served.parents[1] / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in lines
    assert [line.partition("==")[0] for line in lines[:4]] == ["mlflow", "pandas", "transformers", "featherweight"]
    described = (served.parents[1] / "MLmodel").read_text()
    assert str(ROOT) not in described
    size = sum(path.stat().st_size for path in served.iterdir())
    assert f"model_size_bytes: {size}" in described
    assert Manifest.read(served).digest == desk.registry.get(torch_model, "champion").digest


@pytest.fixture(scope="module")
def generator(desk: Bench, torch_model: str) -> Iterator[Generator]:
    made = Generator(desk.root / "torch", max_tokens=64, max_batch=3)
    yield made
    made.close()


@pytest.mark.engine
def test_more_prompts_than_a_batch_are_answered_in_order(generator: Generator) -> None:
    prompts = [f"{'light ' * (index % 3)}{index}" for index in range(7)]
    assert generator(prompts, NEW) == [generator([prompt], NEW)[0] for prompt in prompts]
    assert len(set(generator(prompts, NEW))) > 1


@pytest.mark.engine
@pytest.mark.parametrize(("prompt", "new"), [("light " * 100, 8), ("light", 64), ("light", 0)])
def test_prompts_that_do_not_fit_are_refused(generator: Generator, prompt: str, new: int) -> None:
    with pytest.raises(DataError, match="this model is served with room for 64 tokens"):
        generator([prompt], new)
    assert generator(["light"], 4)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"max_new_tokens": "7"}, "max_new_tokens is a whole number, not '7'"),
        ({"max_new_tokens": True}, "max_new_tokens is a whole number, not True"),
        ({"max_new_tokens": [1] * 1000}, r"max_new_tokens is a whole number, not \[1, 1, .{0,60}$"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens is a whole number, not nan"),
        ({"max_new_tokens": 10**30}, "room for 64 tokens"),
        ({"stop_at_end": "false"}, "stop_at_end is true or false, not 'false'"),
        ({"adapter": {"a": 1}}, "adapter is a name, not {'a': 1}"),
        ({"adapter": "x" * 5000}, r"no adapter 'x{90,97}\.\.\.' is served"),
    ],
)
def test_parameters_of_other_types_are_refused(generator: Generator, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        generator(["light"], **given)


def test_no_columns_hold_no_prompts() -> None:
    import pandas

    assert prompts_of(pandas.DataFrame()) == prompts_of([]) == []


@pytest.mark.engine
def test_engine_that_died_is_started_anew(generator: Generator) -> None:
    answer = generator(PROMPTS, NEW)
    (engine,) = [one for one in workers() if str(generator.served.resolve()) in one.cmdline()]
    engine.kill()
    with pytest.raises(StageError, match="torch died"):
        generator(PROMPTS, NEW)
    assert generator(PROMPTS, NEW) == answer


@pytest.mark.server
@pytest.mark.engine
def test_mlflow_serves_the_champion_over_http(desk: Bench, torch_model: str, tiny_checkpoint: Path) -> None:
    log = desk.root / "serve.log"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{torch_model}@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--workers", "1"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": desk.registry.tracking_uri, "OMP_NUM_THREADS": "1"}
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with log.open("w") as stream, held_port() as port:
        command += ["--port", str(port)]
        server = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment | {"PATH": path}, start_new_session=True)
        try:
            await_url(f"http://127.0.0.1:{port}/ping", server, "scoring", log, timeout_s=300)
            engines = workers(psutil.Process(server.pid))
            assert len(engines) == 1
            asked = {"inputs": PROMPTS[:2], "params": {"max_new_tokens": NEW, "stop_at_end": False}}
            reply = httpx.post(f"http://127.0.0.1:{port}/invocations", json=asked, timeout=300)
            assert reply.status_code == 200, reply.text
            assert reply.json() == {"predictions": [written(tiny_checkpoint, prompt, NEW) for prompt in PROMPTS[:2]]}
            framed = {"dataframe_split": {"columns": ["prompt"], "data": [[PROMPTS[0]]]}, "params": asked["params"]}
            reply = httpx.post(f"http://127.0.0.1:{port}/invocations", json=framed, timeout=300)
            assert reply.json()["predictions"] == [written(tiny_checkpoint, PROMPTS[0], NEW)]
            as_openai_takes_it = {"messages": TALK, **asked["params"]}
            for body in (as_openai_takes_it, {"dataframe_records": [{"messages": TALK}], "params": asked["params"]}):
                reply = httpx.post(f"http://127.0.0.1:{port}/invocations", json=body, timeout=300)
                assert reply.status_code == 200, reply.text
                found = reply.json()  # MLflow puts nothing around the answer to the first
                assert (found if isinstance(found, list) else found["predictions"]) == [written(tiny_checkpoint, TOLD, NEW)]
            wrong = httpx.post(f"http://127.0.0.1:{port}/invocations", json={"inputs": [["a"], 3]}, timeout=300)
            assert wrong.status_code == 400
            room, shape = "this model is served with room for 128 tokens", "a prompt is a text, or a conversation"
            for prompt, reason in (("light " * 200, room), ("light " * 1_700_000, room), (None, shape), (3, shape)):
                refused = httpx.post(f"http://127.0.0.1:{port}/invocations", json={"inputs": [prompt]}, timeout=300)
                assert refused.status_code == 400 and reason in refused.json()["message"], refused.text[-2000:]
                assert len(refused.text) < 500 and "Traceback" not in refused.text and str(ROOT) not in refused.text
        finally:
            end_group(server)
    assert all_end(*engines)
