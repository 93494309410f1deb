"""A worker that is kept: who gets it again, what ends it, and that it counts and costs what it should."""

from __future__ import annotations

import os
import shutil
import signal
from contextvars import copy_context
from pathlib import Path

import psutil
import pytest

from featherweight.progress import Progress
from featherweight.runtimes import kept_worker as module
from featherweight.runtimes.kept_worker import keep_workers, kept_cpu_s, kept_worker, kept_workers
from featherweight.store.served_folder import Serving

pytestmark = pytest.mark.engine
LIMITS = (1, 32, 1, Progress())


@pytest.fixture(scope="module")
def served(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import ctranslate2

    folder = tmp_path_factory.mktemp("kept")
    ctranslate2.converters.TransformersConverter(str(tiny_checkpoint)).convert(str(folder / "model"))
    shutil.copy(tiny_checkpoint / "config.json", folder)
    Serving("ctranslate2", "model").write(folder)
    return folder


def use(served: Path, *limits: object, fresh: bool = False) -> int:
    """The process that answered."""
    with kept_worker(served, *(limits or LIMITS), fresh=fresh) as worker:  # type: ignore[arg-type]
        assert len(worker.generate([[0, 5]], 2)[0]) == 2
        return worker.pid


def test_it_is_lent_to_who_asks_for_the_same_until_the_run_ends(served: Path) -> None:
    with pytest.raises(KeyboardInterrupt), kept_workers():
        first = use(served)
        spent = kept_cpu_s()
        assert use(served) == first and kept_cpu_s() >= spent > 0
        other = use(served, 1, 16, 1, Progress())
        assert other != first and not psutil.pid_exists(first), "a process for other lengths, and one at a time"
        raise KeyboardInterrupt
    assert not psutil.pid_exists(other) and kept_cpu_s() == 0


def test_who_runs_stages_for_others_keeps_it_from_stage_to_stage(served: Path) -> None:
    def two_stages() -> int:
        keep_workers()
        first = use(served)
        keep_workers()
        assert use(served) == first
        kept = module._kept.get()
        assert kept and kept.worker
        kept.worker.close()
        return first

    assert not psutil.pid_exists(copy_context().run(two_stages))


def test_one_that_died_or_failed_is_started_anew_and_so_is_one_whose_start_is_measured(served: Path) -> None:
    with kept_workers():
        first = use(served)
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        second = use(served)
        with pytest.raises(ZeroDivisionError), kept_worker(served, *LIMITS, fresh=False) as worker:
            assert worker.pid == second != first
            _ = 1 / 0
        assert not psutil.pid_exists(second)
        third = use(served)
        assert use(served, fresh=True) != third and not psutil.pid_exists(third)


def test_none_is_kept_outside_a_run_or_where_it_would_take_the_room_of_others(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not psutil.pid_exists(use(served))
    monkeypatch.setattr(module, "memory_bytes", lambda: 10 * 2**20)
    with kept_workers():
        assert not psutil.pid_exists(use(served))


def test_waiting_it_takes_no_processor_time(served: Path) -> None:
    with kept_workers(), kept_worker(served, *LIMITS, fresh=True) as worker:
        worker.generate([[0, 5]], 8)
        before = worker.cpu_s()
        with pytest.raises(psutil.TimeoutExpired):
            psutil.Process(worker.pid).wait(1.5)
        assert worker.cpu_s() - before < 0.05
