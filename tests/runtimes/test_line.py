"""The line before an engine, by a made clock; and real engines that are asked at set times, and by several threads."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Semaphore

import pytest

from featherweight.measure.batching import Batching
from featherweight.measure.load import arrivals
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.client import open_worker
from featherweight.runtimes.interface import Generation, Limits, LoadedModel, Timing, Tokens
from featherweight.runtimes.line import ENDLESSLY, NOW, Ask, Schedule, Written, side_by_side
from featherweight.runtimes.spec import ExportSpec
from featherweight.runtimes.writing import write_served
from featherweight.store.served_folder import Serving
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


def asked(engine: Batched, lengths: list[int], times: list[float], patience_s: float = 1e9, **batching: float) -> Schedule:
    asks = [Ask([1] * length, 4, came=at, until=at + patience_s) for length, at in zip(lengths, times, strict=True)]
    line = Schedule(asks, times, engine.clock, engine.clock.sleep, **batching)
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


def test_a_batch_that_is_not_full_waits_for_its_window_from_when_its_first_came_and_never_holds_more_than_it_may():
    engine = Batched(Clock(), 1.0, most=8)
    line = asked(engine, [5] * 6, [0.0, 0.2, 0.6, 1.2, 1.25, 9.0], most=2, window_s=0.5)
    assert engine.batches == [[5, 5], [5, 5], [5], [5]], "the third came long ago once the engine is free, and takes who is there"
    assert [last for _, last in line.times] == pytest.approx([1.2, 1.2, 2.2, 2.2, 3.2, 10.5])
    engine = Batched(Clock(), 1.0, most=8)
    line = asked(engine, [5, 6, 5], [0.0, 0.1, 0.4], window_s=0.5)
    assert engine.batches == [[5, 5], [6]] and line.times[0][1] == pytest.approx(1.5), "another length closes no window"


def test_a_batch_whose_window_is_open_stays_in_the_line_of_an_engine_that_has_something_to_do():
    clock = Clock()
    asks = [Ask([1], 1, came=at) for at in (0.0, 0.125, 0.25)]
    line = Schedule(asks, [0.0, 0.125, 0.25], clock, clock.sleep, window_s=0.5)
    clock.now += 0.125
    assert line.next_batch(8, idle=False) == [] and list(line.waiting) == asks[:2]
    clock.now += 0.375
    assert line.next_batch(8, idle=False) == asks
    line = Schedule(asks, [0.0, 0.0, 0.0], clock, clock.sleep, most=2, window_s=0.5)
    assert line.next_batch(8, idle=False) == asks[:2], "it is full"


def test_vectors_are_asked_together_at_any_lengths_and_never_with_texts():
    text, short, long = Ask([1], 4), Ask([1], 0, types=[0]), Ask([1, 2], 0, types=[0, 0])
    assert short.alike(long) and not text.alike(short) and not short.alike(text)


def test_a_request_that_is_not_begun_in_time_is_given_up_and_holds_nobody_up() -> None:
    engine = Batched(Clock(), 1.0)
    line = asked(engine, [5, 5, 5, 5], [0.0, 0.1, 0.2, 1.9], patience_s=1.5)
    assert [last for _, last in line.times] == [1.0, 2.0, None, 3.0]
    assert len(engine.batches) == 3


def test_a_line_waits_for_the_next_and_ends_after_the_last() -> None:
    clock, ask = Clock(), Ask([1], 1)
    line = Schedule([ask], [2.5], clock, clock.sleep)
    assert line.next() is None and line.now == 0.0
    assert line.next(until=1.0) is None and line.now == 1.0
    assert line.next(until=ENDLESSLY) is ask and line.now == 2.5
    assert line.next(until=ENDLESSLY) is None


def test_others_wait_behind_the_first_where_nobody_may_overtake() -> None:
    clock = Clock()
    long, short = Ask([1, 2], 1), Ask([1], 1)
    line = Schedule([long, short], [0.0, 0.0], clock, clock.sleep)
    assert line.next(short.alike, overtaking=False) is None
    assert line.next(short.alike) is short


def test_batches_side_by_side_are_no_more_than_there_are_workers_and_each_is_told_of_or_has_failed() -> None:
    gate = Semaphore(2)
    line = Schedule([Ask([length], 1) for length in range(6)], [0.0] * 6)

    def write(batch: list[Ask]) -> Written | None:
        assert gate.acquire(blocking=False), "a third at once"
        try:
            if batch[0].prompt == [4]:
                return None
            return Written([[batch[0].prompt[0]]], 1.0 + batch[0].prompt[0], 2.0 + batch[0].prompt[0])
        finally:
            gate.release()

    def take(idle: bool) -> list[Ask]:
        ask = line.next(until=ENDLESSLY if idle else NOW)
        return [ask] if ask else []

    side_by_side(line, 2, take, write)
    assert line.times == [(1.0 + n, 2.0 + n) if n != 4 else (None, None) for n in range(6)]
    failing = Schedule([Ask([1], 1)], [0.0])

    def take_failing(idle: bool) -> list[Ask]:
        return failing.next_batch(1, idle)

    with pytest.raises(ZeroDivisionError):
        side_by_side(failing, 2, take_failing, lambda batch: 1 // 0)


# Real engines


@pytest.fixture(scope="module", params=[("ctranslate2", {}), ("ctranslate2", {"workers": 2}), ("llama.cpp", {})], ids=str)
def served(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on an engine that answers batch after batch, with one worker and with two, and where a text joins others."""
    engine, keys = request.param
    if missing := RUNTIMES[engine].missing():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("asked")
    text = write_pairs(tmp_path_factory.mktemp("text"))
    spec = ExportSpec.of(engine=engine, max_tokens=64, **keys)
    write_served(spec, checkpoint=tiny_checkpoint, calibration=text, out=folder)
    assert Serving.read(folder).options.get("workers") == ("2" if keys else None)
    return folder


@pytest.mark.engine
def test_an_engine_answers_who_asks_at_set_times_and_from_several_threads_as_it_answers_one_alone(served: Path) -> None:
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 200) for _ in range(draw.randint(3, 6))] for _ in range(12)]
    with open_worker(served, 1, 64, max_batch=3, batch_window_s=0.001) as worker:
        alone = [worker.generate([prompt], 8)[0] for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            together = list(pool.map(lambda prompt: worker.answer([prompt], 8, {})[0], prompts))
        assert together == alone
        came = arrivals(200.0, len(prompts), seed=1)
        times = worker.under_load(prompts, 8, came, 600.0, Batching(2, 0.001))
        assert all(
            first is not None and last is not None and at <= first <= last for at, (first, last) in zip(came, times, strict=True)
        )
        equal = [prompt[:3] for prompt in prompts[:3]]
        assert worker.generate(equal, 8) == [worker.generate([one], 8)[0] for one in equal], "other calls are answered as before"
