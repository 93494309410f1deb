"""The line before an engine, by a made clock; and real engines that are asked at set times, and by several threads."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from featherweight.measure.load import arrivals
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.client import open_worker
from featherweight.runtimes.interface import Generation, Limits, LoadedModel, Timing, Tokens
from featherweight.runtimes.line import Ask, Schedule
from featherweight.runtimes.spec import ExportSpec
from featherweight.runtimes.writing import write_served
from tests.support.families import write_pairs


@dataclass
class Clock:
    """One that stands still until somebody sleeps or works."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Batched(LoadedModel):
    """An engine that takes a set time for a batch, the first half of it up to the first token."""

    clock: Clock
    batch_s: float
    most: int = 1
    batches: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.limits = Limits(1, 64, self.most)

    def load(self) -> None: ...

    def logprobs(self, windows: Tokens) -> list[list[float]]:
        raise NotImplementedError

    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        self.clock.now += self.batch_s
        self.batches.append([len(prompt) for prompt in prompts])
        return Generation([[7] * new_tokens for _ in prompts], Timing(self.batch_s / 2, self.batch_s))


def asked(engine: Batched, lengths: list[int], times: list[float], patience_s: float = 1e9) -> Schedule:
    asks = [Ask([1] * length, 4, until=at + patience_s) for length, at in zip(lengths, times, strict=True)]
    line = Schedule(asks, times, engine.clock, engine.clock.sleep)
    engine.converse(line)
    return line


def test_requests_that_are_answered_one_by_one_wait_as_lindleys_recursion_says() -> None:
    came = list(arrivals(1.25, 200, seed=3))
    line = asked(Batched(Clock(), 0.7), [5] * 200, came)
    free, wanted = 0.0, []
    for at in came:
        free = max(at, free) + 0.7
        wanted.append((pytest.approx(free - 0.35), pytest.approx(free)))
    assert line.times == wanted
    assert any(free - at > 2 for (_, free), at in zip(line.times, came, strict=True) if free), "some have waited"


def test_who_is_alike_is_answered_together_the_others_later_and_nobody_before_he_came() -> None:
    engine = Batched(Clock(), 1.0, most=3)
    line = asked(engine, [5, 5, 6, 5, 5, 6], [0.0, 0.1, 0.2, 0.3, 0.4, 5.0])
    assert engine.batches == [[5], [5, 5, 5], [6], [6]]
    assert [last for _, last in line.times] == pytest.approx([1.0, 2.0, 3.0, 2.0, 2.0, 6.0])


def test_a_request_that_is_not_begun_in_time_is_given_up_and_holds_nobody_up() -> None:
    engine = Batched(Clock(), 1.0)
    line = asked(engine, [5, 5, 5, 5], [0.0, 0.1, 0.2, 1.9], patience_s=1.5)
    assert [last for _, last in line.times] == [1.0, 2.0, None, 3.0]
    assert len(engine.batches) == 3


def test_a_line_waits_for_the_next_and_ends_after_the_last() -> None:
    clock, ask = Clock(), Ask([1], 1)
    line = Schedule([ask], [2.5], clock, clock.sleep)
    assert line.next() is None and line.now == 0.0
    assert line.next(wait=True) is ask and line.now == 2.5
    assert line.next(wait=True) is None


def test_others_wait_behind_the_first_where_nobody_may_overtake() -> None:
    clock = Clock()
    long, short = Ask([1, 2], 1), Ask([1], 1)
    line = Schedule([long, short], [0.0, 0.0], clock, clock.sleep)
    assert line.next(short.alike, overtaking=False) is None
    assert line.next(short.alike) is short


# Real engines


@pytest.fixture(scope="module", params=["ctranslate2", "llama.cpp"])
def served(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on an engine that answers batch after batch, and on one where a text joins others."""
    if missing := RUNTIMES[request.param].missing():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("asked")
    text = write_pairs(tmp_path_factory.mktemp("text"))
    write_served(ExportSpec.of(engine=request.param, max_tokens=64), checkpoint=tiny_checkpoint, calibration=text, out=folder)
    return folder


@pytest.mark.engine
def test_an_engine_answers_who_asks_at_set_times_and_from_several_threads_as_it_answers_one_alone(served: Path) -> None:
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 200) for _ in range(draw.randint(3, 6))] for _ in range(12)]
    with open_worker(served, 1, 64, max_batch=3) as worker:
        alone = [worker.generate([prompt], 8)[0] for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            together = list(pool.map(lambda prompt: worker.answer([prompt], 8, {})[0], prompts))
        assert together == alone
        came = arrivals(200.0, len(prompts), seed=1)
        times = worker.under_load(prompts, 8, came, patience_s=600.0)
        assert all(
            first is not None and last is not None and at <= first <= last for at, (first, last) in zip(came, times, strict=True)
        )
        assert worker.generate([prompts[0]], 8) == [alone[0]], "other calls are answered as before"
