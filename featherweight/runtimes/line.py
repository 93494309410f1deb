"""The line in which texts wait that are asked of an engine, whoever puts them there: users, or a measurement at set times."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

LOOK_S = 0.001
"""How often the line is looked at while there is room for more than is being written."""


@dataclass(frozen=True, eq=False)
class Ask:
    """One text that is asked for: at most `new_tokens` behind a prompt.

    settings: those of a checkpoint (GenerationSettings.values); without any, greedily just so many tokens. adapter: see
    LoadedModel.adapt. until: by the line's clock; where it is not begun by then it is given up.
    """

    prompt: list[int]
    new_tokens: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    until: float = math.inf

    def alike(self, other: Ask) -> bool:
        """Whether an engine that pads nothing can answer the two in one batch."""
        return (len(self.prompt), *self._wanted) == (len(other.prompt), *other._wanted)

    @property
    def _wanted(self) -> tuple[int, Mapping[str, Any], str | None]:
        return self.new_tokens, self.settings, self.adapter


class Line(ABC):
    """Those that wait, in the order in which they came."""

    def __init__(self) -> None:
        self.waiting: deque[Ask] = deque()

    @property
    @abstractmethod
    def now(self) -> float:
        """Seconds, by its clock."""

    @abstractmethod
    def come(self, wait: bool) -> Sequence[Ask]:
        """Those that have come since it was last asked; where it is to wait at least one, unless no more will come."""

    @abstractmethod
    def begun(self, asks: Iterable[Ask], at: float) -> None:
        """Their first tokens were there at `at`."""

    @abstractmethod
    def done(self, ask: Ask, tokens: list[int], at: float | None = None) -> None:
        """It is answered, `at` by the clock, now by default."""

    @abstractmethod
    def failed(self, asks: Iterable[Ask], error: Exception) -> None:
        """They cannot be answered."""

    @abstractmethod
    def given_up(self, ask: Ask) -> None:
        """It was not begun in time."""

    def next(self, fits: Callable[[Ask], bool] = lambda ask: True, *, wait: bool = False, overtaking: bool = True) -> Ask | None:
        """Take the first that fits, of those that have come; overtaking: others may stand before it. None where none does.

        wait: where nobody is there, until somebody comes, unless no more will come.
        """
        while True:
            came = self.come(wait and not self.waiting)
            self.waiting.extend(came)
            self._give_up()
            if self.waiting or not wait or not came:
                break
        found = next(filter(fits, self.waiting if overtaking else list(self.waiting)[:1]), None)
        if found is not None:
            self.waiting.remove(found)
        return found

    def _give_up(self) -> None:
        for ask in [one for one in self.waiting if self.now > one.until]:
            self.waiting.remove(ask)
            self.given_up(ask)


@dataclass(frozen=True)
class Written:
    """The texts of a batch; and by the line's clock, when all had their first tokens, and their last."""

    tokens: list[list[int]]
    first_s: float
    last_s: float

    def tell(self, line: Line, batch: Sequence[Ask]) -> None:
        """Say so to the line in which the batch has waited."""
        line.begun(batch, self.first_s)
        for ask, row in zip(batch, self.tokens, strict=True):
            line.done(ask, row, self.last_s)


def side_by_side(line: Line, most: int, take: Callable[[bool], list[Ask]], write: Callable[[list[Ask]], Written | None]) -> None:
    """Up to `most` batches at once, each in a thread of its own, until nobody waits any more.

    take: the next batch, none where nobody is there; told whether to wait for one. write: None where it was not begun in time.
    """
    running: dict[Future[Written | None], list[Ask]] = {}
    with ThreadPoolExecutor(most) as pool:
        while True:
            while len(running) < most and (batch := take(not running)):
                running[pool.submit(write, batch)] = batch
            if not running:
                return
            for one in wait(running, LOOK_S if len(running) < most else None, FIRST_COMPLETED).done:
                _settle(line, running.pop(one), one)


def _settle(line: Line, batch: list[Ask], written: Future[Written | None]) -> None:
    error = written.exception()
    if isinstance(error, Exception):
        line.failed(batch, error)
    elif texts := written.result():
        texts.tell(line, batch)
    else:
        for ask in batch:
            line.given_up(ask)


class Schedule(Line):
    """Texts that are asked for at set times, by a clock that begins with it, and what becomes of each."""

    def __init__(
        self,
        asks: Sequence[Ask],
        times_s: Sequence[float],
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__()
        self._coming = deque(zip(times_s, asks, strict=True))
        self._asks = list(asks)
        self._clock, self._sleep, self._zero = clock, sleep, clock()
        self._first: dict[Ask, float] = {}
        self._answered: dict[Ask, float] = {}

    @property
    def now(self) -> float:
        return self._clock() - self._zero

    def come(self, wait: bool) -> list[Ask]:
        by, found = self.now, list[Ask]()
        if wait and self._coming and self._coming[0][0] > by:
            by = self._coming[0][0]
            self._sleep(by - self.now)
        while self._coming and self._coming[0][0] <= by:
            found.append(self._coming.popleft()[1])
        return found

    def begun(self, asks: Iterable[Ask], at: float) -> None:
        self._first |= dict.fromkeys(asks, at)

    def done(self, ask: Ask, tokens: list[int], at: float | None = None) -> None:
        self._answered[ask] = self.now if at is None else at

    def failed(self, asks: Iterable[Ask], error: Exception) -> None:
        raise error

    def given_up(self, ask: Ask) -> None:
        """It has no answer."""

    @property
    def times(self) -> list[tuple[float | None, float | None]]:
        """When each had its first token, and when it was answered."""
        return [(self._first.get(ask), self._answered.get(ask)) for ask in self._asks]
