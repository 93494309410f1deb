"""The worker's process: one engine, answering calls as JSON lines over stdin and stdout.

Whatever the libraries print to stdout goes to stderr. The process ends when stdin does, or when its parent is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from featherweight.errors import FeatherweightError, one_line
from featherweight.runtimes.catalog import engine_class
from featherweight.runtimes.interface import Limits, LoadedModel
from featherweight.store.served_folder import Serving
from featherweight.system.processes import end_children

Reply = dict[str, Any]


def main() -> None:
    """Load the engine, say so, and answer until there is nobody left to answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("served", type=Path)
    for name in ("parent", "threads", "max-tokens", "max-batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    replies = _claim_stdout()
    calls = Calls(options.parent)
    limits = Limits(options.threads, options.max_tokens, options.max_batch)
    reply, engine = _load(options.served, limits)
    calls.engine = engine
    _send(replies, reply)
    while engine is not None:
        _send(replies, _answer(engine, calls.lines.get()))


def _claim_stdout() -> TextIO:
    """The protocol keeps stdout for itself; file descriptor 1, which C++ writes to as well, becomes stderr."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return replies


def _send(replies: TextIO, reply: Reply) -> None:
    try:
        replies.write(json.dumps(reply) + "\n")
    except BrokenPipeError:
        os._exit(0)


class Calls:
    """Reads stdin in a thread of its own, so that the end of the parent is seen in the middle of a long computation."""

    def __init__(self, parent: int) -> None:
        self.lines: SimpleQueue[str] = SimpleQueue()
        self.engine: LoadedModel | None = None
        self.parent = parent
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        buffer = b""
        while os.getppid() == self.parent:
            if not select.select([0], [], [], 1.0)[0]:
                continue
            chunk = os.read(0, 1 << 20)
            if not chunk:
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                self.lines.put(line.decode())
        self._end()

    def _end(self) -> None:
        """Leave at once, the engine's own processes included: nobody waits for an answer any more."""
        try:
            if self.engine is not None:
                self.engine.unload()
            end_children(os.getpid())
        finally:
            os._exit(0)


def _load(served: Path, limits: Limits) -> tuple[Reply, LoadedModel | None]:
    try:
        serving = Serving.read(served)
        return {"result": None}, engine_class(serving.engine)(served, serving, limits)
    except Exception as error:
        return _failure(error), None


def _answer(engine: LoadedModel, line: str) -> Reply:
    try:
        call = json.loads(line)
        result = getattr(engine, call["name"])(*call["arguments"])
        return {"result": asdict(result) if hasattr(result, "__dataclass_fields__") else result}
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> Reply:
    traceback.print_exc()
    text = one_line(error, 2000)
    named = isinstance(error, FeatherweightError)
    return {"error": text if named else f"{type(error).__name__}: {text}", "kind": type(error).__name__}


if __name__ == "__main__":
    main()
