"""The protocol between this process and a worker of its own: messages whole, errors as they were, and an end that is one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from featherweight import errors
from featherweight.errors import DivergenceError, StageError
from featherweight.system.child_process import ChildProcess, Messages, error_of, failure
from tests.support.waiting import all_end

TELL = "from featherweight.system.child_process import Channel; channel = Channel.claim_stdout(); "


def child(code: str) -> ChildProcess:
    return ChildProcess([sys.executable, "-c", code], os.environ)


def test_messages_come_whole_out_of_any_pieces() -> None:
    told = [{"a": 1}, {"text": "zwölf\nlines"}, {"c": [1.5, None]}]
    stream = b"\n".join([b"noise", *(json.dumps(one).encode() for one in told), b"3", b""])
    for size in (1, 7, 1000):
        messages = Messages()
        pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert [one for piece in pieces for one in messages.feed(piece)] == told


def test_what_libraries_print_never_reaches_the_protocol() -> None:
    code = f"import os; {TELL}print('noise', flush=True); os.system('echo noise'); os.write(1, b'noise'); channel.send({{'a': 1}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"a": 1}
    assert done.stderr.count("noise") == 3


def test_a_child_answers_in_order_and_ends_when_nobody_speaks_to_it() -> None:
    worker = child(f"import sys, json; {TELL}[channel.send(json.loads(line)) for line in sys.stdin]")
    for number in range(3):
        asked = {"number": number, "long": "x" * 200_000}
        worker.send(asked)
        assert worker.receive(300) == asked
    worker.close()
    assert worker.process.returncode == 0
    assert worker.tail() == "it was closed"


def test_a_child_that_dies_is_told_by_how_and_its_last_words() -> None:
    worker = child("import sys, os; sys.stderr.write('password=hunter2 \\n\\n the  end\\n'); sys.stderr.flush(); os.abort()")
    assert worker.receive(300) is None
    assert (worker.ending(), worker.tail()) == (f"signal {signal.SIGABRT}", "its last words: password=*** | the end")
    with pytest.raises(BrokenPipeError):
        worker.send({})
    worker.close()


def test_a_child_that_hangs_is_ended_with_all_of_its_own() -> None:
    start = "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    worker = child(f"import subprocess, sys, time; {TELL}{start}; channel.send({{'pid': p.pid}}); time.sleep(600)")
    below = psutil.Process((worker.receive(300) or {})["pid"])
    with pytest.raises(TimeoutError, match="no answer in 0 s"):
        worker.receive(0.1)
    worker.kill()
    assert worker.ending() == f"signal {signal.SIGKILL}"
    assert all_end(below)
    worker.close()


@pytest.mark.slow
def test_children_that_share_a_pipe_do_not_talk_at_once(tmp_path: Path) -> None:
    turn = tmp_path / "turn"
    turn.touch()
    talk = (
        "import sys; from pathlib import Path; from featherweight.system.child_process import Channel\n"
        "channel = Channel.claim_stdout(Path(sys.argv[1]))\n"
        "for number in range(20): channel.send({'who': sys.argv[2], 'long': sys.argv[2] * 300_000})"
    )
    both = f"[subprocess.Popen([sys.executable, '-c', {talk!r}, {str(turn)!r}, who]) for who in 'ab']"
    worker, heard = child(f"import subprocess, sys; [one.wait() for one in {both}]"), []
    while message := worker.receive(300):
        assert set(message["long"]) == {message["who"]}
        heard.append(message["who"])
    assert sorted(heard) == ["a"] * 20 + ["b"] * 20
    worker.close()


@pytest.mark.parametrize("name", [name for name, kind in vars(errors).items() if isinstance(kind, type) and name.endswith("Error")])
def test_errors_of_ours_come_over_as_what_they_were(name: str) -> None:
    kind = getattr(errors, name)
    again = error_of(json.loads(json.dumps(failure(kind("it said so")))), "ct2 failed: ")
    assert type(again) is kind
    assert str(again) == "ct2 failed: it said so"


def test_other_errors_come_over_in_words() -> None:
    diverged = error_of(failure(DivergenceError("ran away", (1.0, 9.0))))
    assert isinstance(diverged, DivergenceError)
    assert diverged.losses == (1.0, 9.0)
    assert type(error_of(failure(MemoryError("full")))) is MemoryError
    assert repr(error_of(failure(KeyError("x")))) == repr(RuntimeError("KeyError: 'x'"))
    assert repr(error_of(failure(KeyError("x")), "ct2 failed: ")) == repr(StageError("ct2 failed: KeyError: 'x'"))
    assert repr(error_of({"kind": "one_line", "text": "no error", "losses": []})) == repr(RuntimeError("one_line: no error"))
