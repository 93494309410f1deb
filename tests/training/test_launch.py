"""What the processes of a training say to the one that started them, and what is made of it."""

from __future__ import annotations

import atexit
import subprocess
import sys
import time
from pathlib import Path

import pytest

from featherweight.errors import DataError, DivergenceError, StageError
from featherweight.progress import Metrics, Progress
from featherweight.spec import Spec
from featherweight.system.processes import WORKERS_PEAK, highest, tree_peak_bytes
from featherweight.training.data_parallel import leads
from featherweight.training.launch import run_in_processes
from featherweight.training.threads import cores
from tests.support.waiting import until


class Heard(Progress):
    def __init__(self) -> None:
        self.events: list[object] = []

    def step(self, done: int, total: int, **values: float) -> None:
        self.events.append((done, total, values))

    def note(self, text: str) -> None:
        self.events.append(text)


class AskedSpec(Spec):
    """What the function below is to do."""

    fail: str = ""


def work(spec: AskedSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
    """Speak as a training does; fail as the spec says, in every process at once."""
    print("a library's words")
    if spec.fail == "diverged":
        raise DivergenceError("ran away", tuple(float(number) for number in range(5000)))
    if spec.fail == "short":
        raise DataError("the text is too short")
    if spec.fail == "unexpected":
        raise KeyError("x")
    if spec.fail == "killed":
        time.sleep(0.5)
        raise SystemExit(3)
    progress.note("starting")
    progress.step(1, 2, loss=3.5)
    if leads():
        (out / "made").write_text(str(seed))
    return {"steps": 2.0}


def linger(spec: AskedSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
    """The first process writes, as it ends, whether the second is done, which takes longer."""
    if leads():
        atexit.register(lambda: (out / "seen").write_text(str((out / "done").exists())))
    else:
        time.sleep(1)
        (out / "done").touch()
    return {}


def ask(tmp_path: Path, fail: str = "", heard: Progress | None = None) -> Metrics:
    return run_in_processes(f"{__name__}:work", AskedSpec(fail=fail), {"out": tmp_path}, 7, 1, heard or Heard())


@pytest.mark.slow
def test_progress_and_metrics_are_handed_on_and_noise_is_not(tmp_path: Path) -> None:
    heard = Heard()
    metrics = dict(ask(tmp_path, heard=heard))
    assert metrics.pop(WORKERS_PEAK) > 1e7
    assert metrics == {"steps": 2.0}
    assert heard.events == ["starting", (1, 2, {"loss": 3.5})]
    assert (tmp_path / "made").read_text() == "7"


@pytest.mark.slow
def test_errors_are_raised_as_they_were(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match="ran away") as caught:
        ask(tmp_path, "diverged")
    assert caught.value.losses == tuple(float(number) for number in range(5000))
    with pytest.raises(DataError, match="too short"):
        ask(tmp_path, "short")
    with pytest.raises(RuntimeError, match="KeyError: 'x'"):
        ask(tmp_path, "unexpected")
    with pytest.raises(StageError, match=r"work: its process ended with exit status \d+; its last words: "):
        ask(tmp_path, "killed")


@pytest.mark.slow
@pytest.mark.skipif(cores() < 2, reason="needs two cores")
def test_a_process_that_is_done_waits_for_its_fellow(tmp_path: Path) -> None:
    run_in_processes(f"{__name__}:linger", AskedSpec(), {"out": tmp_path}, 7, 2, Heard())
    assert (tmp_path / "seen").read_text() == "True"


def test_more_processes_than_cores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"work.processes 4096 is more than the \d+ \w+ in reach"):
        run_in_processes(f"{__name__}:work", AskedSpec(), {"out": tmp_path}, 0, 4096, Heard())


def test_the_peak_of_processes_that_run_at_once_is_their_sum() -> None:
    code = "import subprocess, sys; block = bytearray(10 ** 8); sys.argv[1:] and subprocess.run(sys.argv[1:]); input()"
    child = [sys.executable, "-c", code]
    with subprocess.Popen([*child, *child], stdin=subprocess.PIPE) as parent:
        with highest(lambda: tree_peak_bytes(parent.pid), every_s=0.05) as peak:
            until(lambda: peak() > 2 * 10**8)
        parent.communicate(b"\n\n")
    assert 2 * 10**8 < peak() < 4 * 10**8
