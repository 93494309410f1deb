"""Serving: what is verified before it answers, the switch between versions without a lost request, and what attackers see."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow.models import Model
from mlflow.pyfunc.scoring_server import SERVING_MODEL_CONFIG
from mlflow.utils.model_utils import _get_overridden_pyfunc_model_config

from featherweight.errors import IntegrityError, ServiceError
from featherweight.measure.batching import Batching
from featherweight.registry.keys import Keys
from featherweight.registry.model_folder import CODE, SERVED
from featherweight.registry.serving import backend, following, verified_copy
from featherweight.registry.serving.following import Follower
from featherweight.registry.serving.front import BODY_BYTES, VERSION_HEADER, Front, header_word
from featherweight.registry.serving.reasons import reason
from featherweight.runtimes.interface import EngineServer
from featherweight.store.workspace import local_path
from flows.listening import answering, listening
from tests.support.paths import ROOT, SUPPORT
from tests.support.registering import MEASURED, MODEL, Bench, desk, promoted, register
from tests.support.waiting import until

pytestmark = pytest.mark.slow

__all__ = ["desk"]

REQUESTS = int(os.environ.get("FEATHERWEIGHT_TEST_REQUESTS", "400"))
"""How many requests the swap is tried under at least; ask for 2000 to try harder."""
STUB = SUPPORT / "stub_server.py"


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Engines that answer at once with their version's number; those of the numbers in the set do not start."""
    broken: set[str] = set()

    def stub(copy: Any, socket: Path) -> EngineServer:
        number = copy.version.version
        script = "-c" if number in broken else str(STUB)
        command = (sys.executable, "-S", script, "raise SystemExit('no memory')" if number in broken else str(socket), number)
        return EngineServer(command, {}, ("/invocations", "/v1/models", "/v1/completions"), ("/invocations", {"inputs": ["The"]}))

    monkeypatch.setattr(backend, "engine_server", stub)
    return broken


class Served:
    """A model that is served: what was told, and its address."""

    def __init__(self, desk: Bench, front: Front, address: str) -> None:
        self.told: list[tuple[str, str]] = []
        self.url = f"{address}/invocations"
        self.address = address
        self.follower = Follower(
            desk.registry, MODEL, "champion", front, desk.root / "serving", lambda event, text: self.told.append((event, text))
        )

    def ask(self, **body: Any) -> httpx.Response:
        return httpx.post(self.url, json=body, timeout=120)


@pytest.fixture
def served(desk: Bench, stubs: set[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(following, "DRAIN_S", 120.0)
    for name in ("one", "two"):
        register(desk, name)
    promoted(desk, "1")
    front = Front(("127.0.0.1",))
    with listening("127.0.0.1", 0) as listener, answering(front, listener):
        made = Served(desk, front, f"http://127.0.0.1:{listener.getsockname()[1]}")
        made.follower.begin()
        yield made
        made.follower.close(120)
    assert list((desk.root / "serving").iterdir()) == []


def test_no_request_is_lost_across_a_swap_and_a_rollback(desk: Bench, served: Served) -> None:
    seen, moved = Counter[tuple[int, str]](), threading.Event()
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as whatever_happens:
        whatever_happens.callback(moved.set)
        load = pool.submit(lambda: asyncio.run(_load(served.url, seen, moved)))
        until(lambda: seen.total() > 50)
        promoted(desk, "2")
        served.follower.look()
        until(lambda: seen[200, f"{MODEL}/2"] or load.done())
        desk.registry.rollback(MODEL, "ada", "a test")
        served.follower.look()
        moved.set()
        load.result()
    assert seen.total() >= REQUESTS and {status for status, _ in seen} == {200}, seen
    assert {version for _, version in seen} == {f"{MODEL}/1", f"{MODEL}/2"}, seen
    assert [event for event, _ in served.told] == ["switched", "switched"]


def test_what_requests_may_name_is_listed_as_openai_lists_it(desk: Bench, served: Served) -> None:
    answer = httpx.get(f"{served.address}/v1/models")
    created = int(desk.registry.get(MODEL, "1").created_s)
    assert answer.headers[VERSION_HEADER] == f"{MODEL}/1"
    model = {"id": MODEL, "object": "model", "created": created, "owned_by": "featherweight"}
    assert answer.json() == {"object": "list", "data": [model]}
    one = httpx.get(f"{served.address}/v1/models/{MODEL}")
    assert (one.json(), one.headers[VERSION_HEADER]) == (model, f"{MODEL}/1")
    assert httpx.get(f"{served.address}/v1/models/another").status_code == 404


async def _load(url: str, seen: Counter[tuple[int, str]], moved: threading.Event) -> None:
    """Requests, 16 at once, until all moves are made and 100 more; each status with the version that answered."""
    after = 0
    async with httpx.AsyncClient(timeout=120) as client:

        async def user() -> None:
            nonlocal after
            while after < 100 or seen.total() < REQUESTS:
                after += moved.is_set()
                answer = await client.post(url, json={"inputs": ["The"]})
                seen[answer.status_code, answer.headers.get(VERSION_HEADER, "")] += 1
                if seen.total() > 100 and not moved.is_set():
                    await asyncio.sleep(0.1)

        await asyncio.gather(*(user() for _ in range(16)))


def test_what_is_asked_of_the_former_version_is_answered_by_it(
    desk: Bench, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = backend.Backend.drain

    def drained(former: backend.Backend, patience_s: float) -> bool:
        (tmp_path / "go").touch()
        return drain(former, patience_s)

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(served.ask, until=str(tmp_path / "go"))
        until(lambda: served.follower.active and served.follower.active.in_flight)
        promoted(desk, "2")
        with monkeypatch.context() as patched:
            patched.setattr(backend.Backend, "drain", drained)
            served.follower.look()
        assert slow.result().json() == {"by": "1"}
    assert served.ask().json() == {"by": "2"}


def test_a_champion_that_is_altered_or_does_not_start_keeps_the_former_one_serving(
    desk: Bench, served: Served, stubs: set[str]
) -> None:
    weights = local_path(desk.registry.get(MODEL, "2").source) / SERVED / "model.safetensors"  # type: ignore[operator]
    weights.write_bytes(weights.read_bytes() + b"!")
    promoted(desk, "2")
    for _ in range(2):
        served.follower.look()
    ((event, text),) = served.told
    assert event == "kept" and "file model.safetensors is altered" in text and "version 1 keeps serving" in text
    assert served.ask().json() == {"by": "1"}
    assert httpx.get(f"{served.address}/health").json()["note"] == text
    stubs.add(register(desk, "three"))
    promoted(desk, "3")
    served.follower.look()
    assert "version 3 cannot: its server did not start; it said: no memory" in served.told[-1][1]
    assert served.ask().json() == {"by": "1"}
    desk.registry.rollback(MODEL, "ada", "a test")


def test_a_version_that_is_taken_back_while_it_starts_answers_nobody(
    desk: Bench, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted(desk, "2")
    started = Follower._started

    def taken_back(self: Follower, *arguments: Any) -> Any:
        made = started(self, *arguments)
        desk.registry.rollback(MODEL, "ada", "it does not answer")
        return made

    monkeypatch.setattr(Follower, "_started", taken_back)
    served.follower.look()
    assert served.ask().json() == {"by": "1"} and served.told == []


def test_a_server_that_dies_is_started_anew_from_the_copy_that_was_verified(desk: Bench, served: Served) -> None:
    shutil.rmtree(local_path(desk.registry.get(MODEL, "1").source))  # type: ignore[arg-type]
    answer = served.ask(die=True)
    assert answer.status_code == 502 and "it is started anew" in answer.json()["message"]
    until(lambda: served.follower.active and not served.follower.active.alive)
    assert httpx.get(f"{served.address}/health").status_code == 503
    served.follower.revive()
    assert [event for event, _ in served.told] == ["note", "restarted"]
    assert served.ask().json() == {"by": "1"}


def test_a_server_that_dies_with_its_copy_gone_is_told_of_and_the_next_version_served(desk: Bench, served: Served) -> None:
    assert served.follower.active
    shutil.rmtree(served.follower.active.copy.folder.parent)
    served.ask(die=True)
    until(lambda: served.follower.active and not served.follower.active.alive)
    served.follower.revive()
    assert "version 1 does not start again: " in served.told[-1][1] and served.ask().status_code == 502
    promoted(desk, "2")
    served.follower.look()
    assert served.ask().json() == {"by": "2"}


def test_a_registry_that_is_away_or_cut_changes_nothing(desk: Bench, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    promoted(desk, "2")

    def away(*_: Any) -> None:
        raise ServiceError("MLflow does not answer")

    with monkeypatch.context() as patched:
        patched.setattr(following, "look", away)
        served.follower.look()
    desk.registry.client.delete_registered_model(f"{MODEL}.history")
    served.follower.look()
    assert [event for event, _ in served.told] == ["kept", "kept"]
    assert "does not answer" in served.told[0][1] and "was removed or altered" in served.told[1][1]
    assert served.ask().json() == {"by": "1"}


def test_a_model_of_any_name_answers_in_headers_of_ascii() -> None:
    assert [header_word(name) for name in ("my model/3", "ü\r\n名/1")] == ["my model/3", "%C3%BC%0D%0A%E5%90%8D/1"]


def test_strangers_get_reasons_and_no_more(served: Served) -> None:
    wrong = served.ask(fail=True)
    assert (wrong.status_code, wrong.json()) == (400, {"error_code": "BAD", "message": "wrong at ..."})
    assert httpx.get(f"{served.address}/docs").status_code == 404
    assert httpx.post(served.url, json={}, headers={"host": "evil.example"}).status_code == 421
    assert httpx.post(served.url, content=b"x" * (BODY_BYTES + 1)).status_code == 413
    for broken in (
        b"GET /%s HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" % (b"a" * 60000),
        b"\x00\xff" * 500,
        b"POST /invocations HTTP/1.1\r\n",
    ):
        with socket.create_connection(("127.0.0.1", httpx.URL(served.address).port)) as raw:
            raw.sendall(broken)
    assert served.ask().json() == {"by": "1"}
    assert served.follower.active is not None and served.follower.active.drain(patience_s=120)  # its count ends after the answer


HOST = b"host: 127.0.0.1\r\n"
LENGTH = b"content-length: 2\r\n\r\n{}"
RAW = {
    b"POST /invocations?%zz%0d%0a#[]{}|\\^`\x7f\xff HTTP/1.1\r\n" + HOST + LENGTH: (200, 400),
    b"POST /invocations?" + b"a" * 60_000 + b" HTTP/1.1\r\n" + HOST + LENGTH: (200, 400, 431),
    b"POST /invocations HTTP/1.1\r\n" + HOST + b"content-type: \xe9\r\n" + LENGTH: (400, 415),
    b"POST /invocations HTTP/1.1\r\n" + HOST + b"content-type: " + b"a" * 300 + b"\r\n" + LENGTH: (415,),
    b"POST /invocations HTTP/1.1\r\n" + HOST + b"accept: \xff\r\n" + LENGTH: (200, 400),
    b"POST /invocations HTTP/1.1\r\nhost: [\r\n" + LENGTH: (400, 421),
    b"POST /invocations HTTP/1.1\r\nhost: 127.0.0.1/invocations?\r\n" + LENGTH: (400, 421),
    b"POST /invocations HTTP/1.1\r\nhost: x@127.0.0.1\r\n" + LENGTH: (400, 421),
    b"POST /../../etc/passwd HTTP/1.1\r\n" + HOST + LENGTH: (404,),
    b"POST /invocations%0a\xff HTTP/1.1\r\n" + HOST + LENGTH: (400, 404),
    b"DELETE /invocations HTTP/1.1\r\n" + HOST + LENGTH: (405,),
}


def test_no_request_is_lost_count_of_whatever_it_holds(served: Served) -> None:
    """A request that could not be passed on was counted for ever, so that the former version never ended."""
    for asked, statuses in RAW.items():
        with socket.create_connection(("127.0.0.1", httpx.URL(served.address).port), timeout=60) as raw:
            raw.sendall(asked)
            answer = raw.recv(2**16)
        assert int(answer.split()[1]) in statuses and str(ROOT).encode() not in answer, (asked[:100], answer)
    for told in ({"error_code": "a\nb: c", "message": [f"{sys.prefix}/x"]}, {"error_code": {"x": 1}}, "text", ["x"] * 5000):
        wrong = served.ask(fail=told)
        assert wrong.status_code == 400 and wrong.json()["error_code"] == "BAD_REQUEST" and len(wrong.text) < 500, wrong.text
    assert served.ask().json() == {"by": "1"}
    assert served.follower.active is not None and served.follower.active.drain(patience_s=120)


@pytest.mark.parametrize(
    ("status", "said", "code", "why"),
    [
        (400, '{"error_code": "BAD_REQUEST", "message": "Failed to predict data \'x\'. \\nError: no"}', "BAD_REQUEST", "no"),
        (400, '{"error_code": "X", "message": "no", "stack_trace": "Traceback"}', "X", "no"),
        (422, '{"error": {"message": "too long", "type": "BadRequestError"}}', "BadRequestError", "too long"),
        (404, '{"error": "none such"}', "BAD_REQUEST", "none such"),
        (405, '{"detail": "Method Not Allowed"}', "BAD_REQUEST", "Method Not Allowed"),
        (415, "takes text/csv, application/json, not a/b", "BAD_REQUEST", "takes text/csv, application/json, not a/b"),
        (500, "no such file: '/usr/lib/x.py'", "BAD_REQUEST", "no such file: '...'"),
        (400, '{"detail": ' + "[" * 100_000, "BAD_REQUEST", None),
        (400, "", "BAD_REQUEST", "the request was refused"),
    ],
)
def test_an_error_is_told_by_its_reason(status: int, said: str, code: str, why: str | None) -> None:
    answer = reason(status, said.encode())
    told = json.loads(bytes(answer.body))
    assert (answer.status_code, told["error_code"]) == (status, code)
    assert told["message"] == why or (why is None and len(told["message"]) <= 400)


def test_what_an_engines_own_server_would_leave_out_is_refused_by_name(served: Served) -> None:
    def answer(**asked: Any) -> httpx.Response:
        return httpx.post(f"{served.address}/v1/completions", json=asked)

    for right in ({"prompt": "The", "temperature": 0}, {"messages": [], "user": "me", "store": False}):
        assert answer(**right).status_code == 200
    for name, more in (("temprature", "; did you mean 'temperature'?"), ("guided_json", "")):
        wrong = answer(**{"prompt": "The", name: 0.5})
        assert (wrong.status_code, wrong.json()["message"]) == (
            400,
            f"no parameter '{name}' is taken at /v1/completions{more}",
        )
    assert served.ask(anything=1).status_code == 200  # of which the server tells nothing


def test_a_token_is_asked_for(stubs: set[str]) -> None:
    front = Front(token="s3cret")
    with listening("127.0.0.1", 0) as listener, answering(front, listener):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert httpx.post(f"{url}/invocations", json={}).status_code == 401
        assert httpx.post(f"{url}/invocations", json={}, headers={"authorization": "Bearer s3cret"}).status_code == 503
        with pytest.raises(ServiceError, match="cannot listen on port"), listening("127.0.0.1", listener.getsockname()[1]):
            pass


# -- what is verified ---------------------------------------------------------------------------------------------------


def copied(desk: Bench, folder: str = "model") -> Any:
    home = verified_copy.private_folder(desk.root / "serving")
    seen = desk.registry.model(MODEL)
    return verified_copy.verified_copy(desk.registry, seen, seen.pick("1"), home / folder)


def test_it_is_served_as_it_was_measured_by_code_of_this_installation(desk: Bench) -> None:
    register(desk, "one")
    source = local_path(desk.registry.get(MODEL, "1").source)
    assert source is not None
    (source / CODE.name).write_text("raise SystemExit('code of somebody else')")
    (source / "MLmodel").write_text("flavors: {}")
    copy = copied(desk)
    assert (copy.threads, copy.batching, copy.max_tokens) == (3, Batching(1), 512)
    assert (copy.folder / CODE.name).read_bytes() == CODE.read_bytes()
    assert copy.folder.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("signed", [False, True])
def test_mlflow_takes_every_measured_setting_of_a_served_version(
    desk: Bench, monkeypatch: pytest.MonkeyPatch, signed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It leaves out, with a warning in its log, each that the model's own file does not name."""
    if signed:
        monkeypatch.setenv("FEATHERWEIGHT_KEYS", str(desk.root / "keys"))
        Keys.here().make()
    register(desk, "one")
    copy = copied(desk)
    server = backend.server_of(copy, desk.root / "socket")
    asked = json.loads(server.environment[SERVING_MODEL_CONFIG])
    assert asked == {"threads": 3, "max_batch": 1, "batch_window_s": 0.0}
    kept = Model.load(str(copy.folder)).flavors["python_function"]["config"]
    log = logging.getLogger("test")
    assert _get_overridden_pyfunc_model_config(kept, asked, log) == asked and not caplog.records


TAMPERINGS = {
    "model.safetensors": lambda served: (served / "model.safetensors").write_bytes(b"other"),
    "serving.json": lambda served: (served / "serving.json").unlink(),
    "extra.py": lambda served: (served / "extra.py").write_text("x"),
    "link.bin": lambda served: (served / "link.bin").symlink_to("/etc/passwd"),
    "registered files were removed": lambda served: shutil.rmtree(served),
}


@pytest.mark.parametrize("named", TAMPERINGS)
def test_altered_files_are_named(desk: Bench, named: str) -> None:
    register(desk, "one")
    source = local_path(desk.registry.get(MODEL, "1").source)
    assert source is not None
    TAMPERINGS[named](source / SERVED)
    with pytest.raises(IntegrityError, match=named):
        copied(desk)


def test_with_keys_every_file_and_the_version_itself_have_to_be_signed(desk: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_KEYS", str(desk.root / "keys"))
    Keys.here().make()
    register(desk, "one")
    assert (copied(desk).folder / "model.sig").is_file()
    source = local_path(desk.registry.get(MODEL, "1").source)
    assert source is not None
    (source / CODE.name).write_text("print('altered')")
    with pytest.raises(IntegrityError, match=f"not what was signed: {CODE.name} \\(altered\\)"):
        copied(desk)
    desk.registry.client.set_model_version_tag(MODEL, "1", "featherweight.attestation", "AAAA")
    with pytest.raises(IntegrityError, match="no trusted key attests"):
        copied(desk)


def test_folders_of_processes_that_were_killed_are_removed(desk: Bench) -> None:
    root = desk.root / "serving"
    left, mine = verified_copy.private_folder(root), verified_copy.private_folder(root)
    (left / verified_copy.OWNER).write_text((left / verified_copy.OWNER).read_text().rpartition("|")[0] + "|1.0")
    verified_copy.private_folder(root)
    assert mine.is_dir() and not left.exists()


def test_the_measured_threads_are_those_of_the_verified_lineage(desk: Bench) -> None:
    register(desk, "one")
    told = json.dumps(MEASURED | {"threads_1": 64})
    desk.registry.client.set_model_version_tag(MODEL, "1", "featherweight.metrics", told)
    assert copied(desk).threads == 3
    version = replace(desk.registry.get(MODEL, "1"), tags={})
    with pytest.raises(IntegrityError):
        verified_copy.verified_copy(desk.registry, desk.registry.model(MODEL), version, desk.root / "never")
