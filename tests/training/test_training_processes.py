"""What the processes of a stage say to the one that started them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time

import pytest

from featherweight.errors import DataError, DivergenceError
from featherweight.progress import Progress
from featherweight.system.processes import highest, tree_peak_bytes
from tasks.training_processes import _listen


class Heard(Progress):
    def __init__(self) -> None:
        self.events: list[object] = []

    def step(self, done: int, total: int, **values: float) -> None:
        self.events.append((done, total, values))

    def note(self, text: str) -> None:
        self.events.append(text)


def said(*messages: object) -> io.BytesIO:
    lines = [message if isinstance(message, str) else json.dumps(message) for message in messages]
    return io.BytesIO("\n".join(lines).encode() + b"\n")


def test_progress_and_metrics_are_handed_on_and_noise_is_not() -> None:
    heard = Heard()
    step = {"step": {"done": 1, "total": 2, "values": {"loss": 3.5}}}
    metrics = _listen(said("a library's words", "3", {"note": "resuming"}, step, {"metrics": {"steps": 2}}), heard)
    assert metrics == {"steps": 2}
    assert heard.events == ["resuming", (1, 2, {"loss": 3.5})]


def test_the_peak_of_processes_that_run_at_once_is_their_sum() -> None:
    code = "import subprocess, sys; block = bytearray(10 ** 8); sys.argv[1:] and subprocess.run(sys.argv[1:]); input()"
    child = [sys.executable, "-c", code]
    with subprocess.Popen([*child, *child], stdin=subprocess.PIPE) as parent:
        with highest(lambda: tree_peak_bytes(parent.pid), every_s=0.05) as peak:
            deadline = time.monotonic() + 20
            while peak() < 2 * 10**8 and time.monotonic() < deadline:
                time.sleep(0.05)
        parent.communicate(b"\n\n")
    assert 2 * 10**8 < peak() < 4 * 10**8


def test_processes_that_only_end_give_nothing() -> None:
    assert _listen(said({"note": "starting"}), Heard()) is None


def test_errors_are_raised_as_they_were() -> None:
    with pytest.raises(DivergenceError, match="ran away") as caught:
        _listen(said({"error": {"kind": "DivergenceError", "text": "ran away", "losses": [1.0, 9.0]}}), Heard())
    assert caught.value.losses == (1.0, 9.0)
    with pytest.raises(DataError, match="too short"):
        _listen(said({"error": {"kind": "DataError", "text": "too short", "losses": []}}), Heard())
    with pytest.raises(MemoryError):
        _listen(said({"error": {"kind": "MemoryError", "text": "", "losses": []}}), Heard())
    with pytest.raises(RuntimeError, match="KeyError: 'x'"):
        _listen(said({"error": {"kind": "KeyError", "text": "'x'", "losses": []}}), Heard())
