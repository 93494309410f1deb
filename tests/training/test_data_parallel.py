"""The cores that training uses, and a group of one process."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.training import loop, threads
from featherweight.training.data_parallel import DataParallelGroup
from featherweight.training.losses import token_loss
from featherweight.training.plan import TrainingPlan
from featherweight.training.threads import all_cores, training_threads


def cores(monkeypatch: pytest.MonkeyPatch, available: int, physical: int, told: str | None = None) -> None:
    """A machine of `physical` cores of which `available` logical ones are in reach, and what OMP_NUM_THREADS says."""
    monkeypatch.setattr(threads, "available_cores", lambda: available)
    monkeypatch.setattr(threads, "physical_cores", lambda: physical)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)


@pytest.mark.parametrize(
    ("available", "physical", "told", "threads"),
    [(2, 2, None, 2), (16, 8, None, 8), (2, 64, None, 2), (8, 8, "3", 3), (2, 2, "64", 2), (4, 4, "0", 4), (4, 4, "2,1", 4)],
)
def test_threads_are_the_cores_in_reach_and_no_more_than_told(
    available: int, physical: int, told: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(monkeypatch, available, physical, told)
    assert training_threads() == threads


def test_training_computes_with_that_many_threads_and_no_others(tiny_checkpoint: Path) -> None:
    """Beside `training_threads` threads no thread of the process has a part in it; servers of earlier tests take a moment."""
    model = opening.load_model(tiny_checkpoint)
    blocks = torch.randint(300, (32, 64), generator=torch.Generator().manual_seed(0))
    process, seen = psutil.Process(), set()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return token_loss(model, ids)

    before = torch.get_num_threads()
    spent = {thread.id: thread.user_time for thread in process.threads()}
    loop.train_loop(model, blocks, TrainingPlan(10, 16, 1e-3), loss_fn=loss)
    times = [thread.user_time - spent.get(thread.id, 0.0) for thread in process.threads()]
    busy = [time for time in times if time > max(times) / 10]
    assert seen == {training_threads()}
    assert len(busy) <= training_threads()
    assert torch.get_num_threads() == before


def test_the_number_of_threads_comes_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, available=3, physical=3)
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), all_cores():
        assert torch.get_num_threads() == 3
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_a_group_of_one_changes_nothing_and_needs_no_accelerate() -> None:
    alone, rows = DataParallelGroup(), torch.arange(6).view(3, 2)
    assert (alone.rank, alone.size, alone._accelerator) == (0, 1, None)
    assert alone.share(rows) is not None and torch.equal(alone.share(rows), rows)
    assert torch.equal(alone.rows(rows[0]), rows[:1])
    assert alone.add(1.5, 2.0) == [1.5, 2.0]
