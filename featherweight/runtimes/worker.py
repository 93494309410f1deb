"""The worker's process: one engine, answering calls over stdin and stdout.

Whatever the libraries print to stdout goes to stderr. The process ends when stdin does, or when its parent is gone.
"""

from __future__ import annotations

import argparse
import os
import select
import threading
import traceback
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.gpu_memory import GpuMemory
from featherweight.runtimes.interface import Limits, LoadedModel
from featherweight.store.served_folder import Serving
from featherweight.system.child_process import Channel, Message, Messages, failure
from featherweight.system.device import CPU
from featherweight.system.processes import end_children


def main() -> None:
    """Load the engine, say so, and answer until there is nobody left to answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("served", type=Path)
    for name in ("parent", "threads", "max-tokens", "max-batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    replies = Channel.claim_stdout()
    calls = Calls(options.parent)
    limits = Limits(options.threads, options.max_tokens, options.max_batch)
    reply, engine = _load(options.served, limits)
    calls.engine = engine
    _send(replies, reply)
    while engine is not None:
        _send(replies, _answer(engine, calls.messages.get()))


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
                self.messages.put(message)
        self._end()

    def _end(self) -> None:
        """Leave at once, the engine's own processes included: nobody waits for an answer any more."""
        try:
            if self.engine is not None:
                self.engine.unload()
            end_children(os.getpid())
        finally:
            os._exit(0)


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
