"""Requests that come when they come, asked of served variants by turns, each as it answers them best."""

from __future__ import annotations

from featherweight.measure.batching import Batching, Trial, best_batching, tried
from featherweight.measure.load import Load, arrivals
from featherweight.measure.request import Request
from featherweight.measure.spec import RequestsSpec
from featherweight.progress import Progress
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.measuring import MeasuredVariant, by_turns
from featherweight.spec import HEADED


def ask_in_turns(
    variant: MeasuredVariant, baseline: MeasuredVariant, requests: RequestsSpec, progress: Progress
) -> list[tuple[Load, Load]]:
    """Requests at each rate by turns: what those of each side wait, answered together as it was chosen for that side."""
    askers = {side: _Asker(side, requests, progress) for side in dict.fromkeys((variant, baseline))}
    found = []
    for rate in requests.rate:
        rounds: dict[MeasuredVariant, list[tuple[Request, ...]]] = {side: [] for side in askers}
        progress.note(f"{rate:g} requests a second")
        for turn in range(requests.rounds):
            for side in by_turns(askers, turn):
                rounds[side].append(askers[side].ask(rate, turn))
            progress.step(turn + 1, requests.rounds)
        loads = {side: asker.load(rate, rounds[side]) for side, asker in askers.items()}
        found.append((loads[variant], loads[baseline]))
    return found


class _Asker:
    """A variant that requests are asked of, warm, and how many of them it answers together."""

    def __init__(self, side: MeasuredVariant, requests: RequestsSpec, progress: Progress) -> None:
        self.side, self.requests, self.progress = side, requests, progress
        side.prepare(side.fullest)
        self.tried = self._tries()
        self.batching = best_batching(self.tried) if self.tried else Batching(max(self._batches), min(self._windows_s))

    @property
    def _batches(self) -> tuple[int, ...]:
        return self.requests.max_batch or self.side.workload.spec.batch_sizes

    @property
    def _windows_s(self) -> tuple[float, ...]:
        """An engine that lets a text join those that it is writing fills no batch. What answers at once is answered in batches."""
        windows, joins = self.requests.batch_window_s, RUNTIMES[self.side.engine].joins
        return (min(windows),) if joins and self.side.workload.task not in HEADED else windows

    def _tries(self) -> tuple[Trial, ...]:
        """Trials at the highest rate, of requests that are not those of the measurement; or those of before."""
        if (known := self.side.known) and known.loads:
            return known.loads[0].tried
        rate, turn = max(self.requests.rate), self.requests.rounds

        def attempt(batching: Batching) -> tuple[Request, ...]:
            together = f"{batching.max_batch} at once, a window of {1000 * batching.window_s:g} ms"
            self.progress.note(f"trying {self.side.engine} with {together}")
            return self._asked(rate, turn, batching, self.requests.trial_count)

        return tried(self._batches, self._windows_s, attempt, self.requests.patience_s)

    def ask(self, rate: float, turn: int) -> tuple[Request, ...]:
        """What a round's requests waited. The same of every variant, and their times too."""
        return self._asked(rate, turn, self.batching, self.requests.count(rate))

    def _asked(self, rate: float, turn: int, batching: Batching, count: int) -> tuple[Request, ...]:
        work = self.side.workload
        prompts, came = work.asked(rate, turn)[:count], arrivals(rate, count, seed=turn)
        told = prompts, self._new_tokens, came, self.requests.patience_s, batching
        times = self.side.worker.under_load(*told, headed=work.task in HEADED)
        return tuple(Request(at, first, last) for at, (first, last) in zip(came, times, strict=True))

    @property
    def _new_tokens(self) -> int:
        return self.side.workload.new_tokens(self.side.fullest)

    def load(self, rate: float, rounds: list[tuple[Request, ...]]) -> Load:
        """All rounds of a rate."""
        threads = self.side.threads(self.side.fullest)
        return Load(rate, threads, self._new_tokens, tuple(rounds), self.batching, self.tried)
