"""The worker's process: one engine, answering calls over stdin and stdout, each reply with its call's number.

Texts that are asked for while others are written wait in one line with them (line.py), whoever asks; other calls wait their turn.
Whatever the libraries print to stdout goes to stderr. The process ends when stdin does, or when its parent is gone.
"""

from __future__ import annotations

import argparse
import os
import select
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.gpu_memory import GpuMemory
from featherweight.runtimes.interface import Limits, LoadedModel
from featherweight.runtimes.line import ENDLESSLY, Ask, Line
from featherweight.store.served_folder import Serving
from featherweight.system.child_process import Channel, Message, Messages, failure
from featherweight.system.device import CPU
from featherweight.system.processes import end_children

JOINED = ("answer", "outputs")
"""Calls whose texts are answered together with those of others."""


def main() -> None:
    """Load the engine, say so, and answer until there is nobody left to answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("served", type=Path)
    for name in ("parent", "threads", "max-tokens", "max-batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--batch-window-s", type=float, required=True)
    options = parser.parse_args()
    replies = Channel.claim_stdout()
    calls = Calls(options.parent)
    limits = Limits(options.threads, options.max_tokens, options.max_batch, options.batch_window_s)
    reply, engine = _load(options.served, limits)
    calls.engine = engine
    _send(replies, reply)
    call = calls.messages.get() if engine else None
    while engine and call:
        if call["name"] in JOINED:
            line = Calling(call, calls.messages, replies, limits.batch_window_s)
            _converse(engine, line)
            call = line.next_call
        else:
            _send(replies, {"id": call["id"], **_answer(engine, call)})
            call = None
        call = call or calls.messages.get()


def _send(replies: Channel, reply: Message) -> None:
    try:
        replies.send(reply)
    except BrokenPipeError:
        os._exit(0)


class Calls:
    """Reads stdin in a thread of its own, so that the end of the parent is seen in the middle of a long computation."""

    def __init__(self, parent: int) -> None:
        self.messages: SimpleQueue[Message] = SimpleQueue()
        self.engine: LoadedModel | None = None
        self.parent = parent
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        arriving = Messages()
        while os.getppid() == self.parent:
            if not select.select([0], [], [], 1.0)[0]:
                continue
            chunk = os.read(0, 1 << 20)
            if not chunk:
                break
            for message in arriving.feed(chunk):
                self.messages.put(message | {"came": time.monotonic()})
        self._end()

    def _end(self) -> None:
        """Leave at once, the engine's own processes included: nobody waits for an answer any more."""
        try:
            if self.engine is not None:
                self.engine.unload()
            end_children(os.getpid())
        finally:
            os._exit(0)


class Calling(Line):
    """The texts of a call, and of those that come while they are being written. next_call: one for something else, after which
    nobody joins any more.
    """

    def __init__(self, call: Message, messages: SimpleQueue[Message], replies: Channel, window_s: float) -> None:
        super().__init__(window_s=window_s)
        self.next_call: Message | None = None
        self._messages, self._replies = messages, replies
        self._places: dict[Ask, tuple[int, int]] = {}
        self._answers: dict[int, list[list[Any] | None]] = {}
        self.waiting.extend(self._take(call))

    def _take(self, call: Message) -> list[Ask]:
        asks = _asks(call)
        self._answers[call["id"]] = [None] * len(asks)
        self._places |= {ask: (call["id"], place) for place, ask in enumerate(asks)}
        return asks

    @property
    def now(self) -> float:
        return time.monotonic()

    def come(self, until: float) -> Sequence[Ask]:
        """For others in a batch's window it waits; for the first of a batch it never does, but ends."""
        found = list[Ask]()
        with suppress(Empty):
            while self.next_call is None:
                patience = until - self.now if until < ENDLESSLY and not found else 0.0
                call = self._messages.get(timeout=patience) if patience > 0 else self._messages.get_nowait()
                if call["name"] in JOINED:
                    found += self._take(call)
                else:
                    self.next_call = call
        return found

    def begun(self, asks: Iterable[Ask], at: float) -> None:
        """Nobody is told before a text is whole."""

    def done(self, ask: Ask, tokens: list[Any], at: float | None = None) -> None:
        number, place = self._places.pop(ask)
        if number not in self._answers:  # another text of its call has failed
            return
        self._answers[number][place] = tokens
        if None not in self._answers[number]:
            _send(self._replies, {"id": number, "result": self._answers.pop(number)})

    def failed(self, asks: Iterable[Ask], error: Exception) -> None:
        """Nothing of their calls is answered any more."""
        numbers = {self._places[ask][0] for ask in asks} & self._answers.keys()
        self.waiting = deque(ask for ask in self.waiting if self._places[ask][0] not in numbers)
        reply = _failure(error)
        for number in numbers:
            del self._answers[number]
            _send(self._replies, {"id": number, **reply})

    def given_up(self, ask: Ask) -> None:
        self.done(ask, [])

    def all_failed(self, error: Exception) -> None:
        """So it is with whoever has no answer yet."""
        self.failed(list(self._places), error)


def _asks(call: Message) -> list[Ask]:
    if call["name"] == "outputs":
        return [Ask(ids, 0, types=types, came=call["came"]) for ids, types in zip(*call["arguments"], strict=True)]
    prompts, new_tokens, settings, adapter = call["arguments"]
    return [Ask(prompt, new_tokens, settings, adapter, came=call["came"]) for prompt in prompts]


def _converse(engine: LoadedModel, line: Calling) -> None:
    try:
        work = partial(engine.converse, line)
        engine.gpu_memory.around(work) if engine.gpu_memory else work()
    except Exception as error:
        line.all_failed(error)


def _load(served: Path, limits: Limits) -> tuple[Message, LoadedModel | None]:
    try:
        serving = Serving.read(served)
        kind = RUNTIMES[serving.engine].loaded_model()
        memory = GpuMemory(os.getpid()) if serving.device != CPU else None
        engine = memory.around(lambda: kind(served, serving, limits)) if memory else kind(served, serving, limits)
        engine.gpu_memory = memory
        return {"result": engine.served_on()}, engine
    except Exception as error:
        return _failure(error), None


def _answer(engine: LoadedModel, call: Message) -> Message:
    try:
        work = partial(getattr(engine, call["name"]), *call["arguments"])
        result = engine.gpu_memory.around(work) if engine.gpu_memory else work()
        return {"result": asdict(result) if hasattr(result, "__dataclass_fields__") else result}
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> Message:
    traceback.print_exc()
    return {"error": failure(error)}


if __name__ == "__main__":
    main()
