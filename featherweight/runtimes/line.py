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
NOW, ENDLESSLY = -math.inf, math.inf


@dataclass(frozen=True, eq=False)
class Ask:
    """One text that is asked for: at most `new_tokens` behind a prompt.

    settings: those of a checkpoint (GenerationSettings.values); without any, greedily just so many tokens. adapter: see
    LoadedModel.adapt. types: where vectors or labels are asked for (LoadedModel.outputs), those of its tokens. came, until: by the
    line's clock; where it is not begun by then it is given up.
    """

    prompt: list[int]
    new_tokens: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    types: list[int] | None = None
    came: float = 0.0
    until: float = math.inf

    def alike(self, other: Ask) -> bool:
        """Whether an engine can answer the two in one batch: texts are padded for vectors and labels alone."""
        if self.types is not None or other.types is not None:
            return self.types is not None and other.types is not None
        return (len(self.prompt), *self._wanted) == (len(other.prompt), *other._wanted)

    @property
    def _wanted(self) -> tuple[int, Mapping[str, Any], str | None]:
        return self.new_tokens, self.settings, self.adapter


class Line(ABC):
    """Those that wait, in the order in which they came.

    most: so many are answered at once, or as many as the engine was opened for where that is less. window_s: so long the first of
    a batch that is not full waits for others, from when it came; an engine that lets a text join others waits for nobody.
    """

    def __init__(self, most: float = math.inf, window_s: float = 0.0) -> None:
        self.waiting: deque[Ask] = deque()
        self.most, self.window_s = most, window_s

    @property
    @abstractmethod
    def now(self) -> float:
        """Seconds, by its clock."""

    @abstractmethod
    def come(self, until: float) -> Sequence[Ask]:
        """Those that have come since it was last asked; where nobody has, the next, if somebody comes until then by the clock."""

    @abstractmethod
    def begun(self, asks: Iterable[Ask], at: float) -> None:
        """Their first tokens were there at `at`."""

    @abstractmethod
    def done(self, ask: Ask, tokens: list[Any], at: float | None = None) -> None:
        """It is answered, `at` by the clock, now by default."""

    @abstractmethod
    def failed(self, asks: Iterable[Ask], error: Exception) -> None:
        """They cannot be answered."""

    @abstractmethod
    def given_up(self, ask: Ask) -> None:
        """It was not begun in time."""

    def next(self, fits: Callable[[Ask], bool] = lambda ask: True, *, until: float = NOW, overtaking: bool = True) -> Ask | None:
        """Take the first that fits, of those that have come; overtaking: others may stand before it. None where none does.

        until: where none does, wait for one up to then by the clock; ENDLESSLY until one comes, unless no more will come.
        """
        came = self.come(NOW)
        while True:
            self.waiting.extend(came)
            self._give_up()
            found = next(filter(fits, self.waiting if overtaking else list(self.waiting)[:1]), None)
            if found is not None:
                self.waiting.remove(found)
                return found
            if self.now >= until or not (came := self.come(until)):
                return None

    def next_batch(self, most: int, idle: bool) -> list[Ask]:
        """The first that waits, and those that are like it, `most` in all; none where nobody does. idle: there is nothing else to
        do than to wait, for the first and for others in its window; else a batch whose window is still open is left in the line.
        """
        first = self.next(until=ENDLESSLY if idle else NOW)
        batch, most = [first] if first else [], int(min(most, self.most))
        closes = first.came + self.window_s if first else NOW
        while first and len(batch) < most and (other := self.next(first.alike, until=closes if idle else NOW)):
            batch.append(other)
        if not idle and len(batch) < most and self.now < closes:
            self.waiting.extendleft(reversed(batch))
            return []
        return batch

    def _give_up(self) -> None:
        for ask in [one for one in self.waiting if self.now > one.until]:
            self.waiting.remove(ask)
            self.given_up(ask)


@dataclass(frozen=True)
class Written:
    """The texts of a batch, or the rows of an encoder's answers; and by the line's clock, when all had their first tokens, and
    their last.
    """

    tokens: list[list[Any]]
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
        *,
        most: float = math.inf,
        window_s: float = 0.0,
    ) -> None:
        super().__init__(most, window_s)
        self._coming = deque(zip(times_s, asks, strict=True))
        self._asks = list(asks)
        self._clock, self._sleep, self._zero = clock, sleep, clock()
        self._first: dict[Ask, float] = {}
        self._answered: dict[Ask, float] = {}

    @property
    def now(self) -> float:
        return self._clock() - self._zero

    def come(self, until: float) -> list[Ask]:
        by, found = self.now, list[Ask]()
        awaited = min(until, self._coming[0][0] if self._coming else math.inf)
        if by < awaited < math.inf:
            by = awaited
            self._sleep(max(0.0, by - self.now))
        while self._coming and self._coming[0][0] <= by:
            found.append(self._coming.popleft()[1])
        return found

    def begun(self, asks: Iterable[Ask], at: float) -> None:
        self._first |= dict.fromkeys(asks, at)

    def done(self, ask: Ask, tokens: list[Any], at: float | None = None) -> None:
        self._answered[ask] = self.now if at is None else at

    def failed(self, asks: Iterable[Ask], error: Exception) -> None:
        raise error

    def given_up(self, ask: Ask) -> None:
        """It has no answer."""

    @property
    def times(self) -> list[tuple[float | None, float | None]]:
        """When each had its first token, and when it was answered."""
        return [(self._first.get(ask), self._answered.get(ask)) for ask in self._asks]
