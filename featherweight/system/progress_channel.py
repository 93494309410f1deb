"""Progress told through a file: one JSON object a line, `{kind: value}`, written from any process and followed by another.

The file is named by value, so a stage that runs elsewhere gets its path and no live listener. Where there is no channel, or its
folder is not on that machine, nobody is told and nothing else changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.progress import Progress

# Seconds between two lines of one stage's loop: a reader redraws a few times a second, and a step may take microseconds.
PAUSE_S = 0.1


@dataclass(frozen=True)
class ProgressChannel:
    """Where progress is told; nowhere without a path."""

    path: Path | None = None

    def tell(self, kind: str, value: Any) -> None:
        """Append one message, in one write, so that those of several processes never mix within a line."""
        if self.path is None:
            return
        line = json.dumps({kind: value}) + "\n"
        # A folder that is not here means nobody listens; a full disk stops the work itself, with a clear line of its own.
        with contextlib.suppress(OSError):
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)

    def progress(self, node: str) -> ChannelProgress:
        """What the stage of a node calls."""
        return ChannelProgress(self, node)

    def follow(self) -> Iterator[tuple[str, Any]]:
        """The messages in their order, as (kind, value); ('', None) each time that there is no more for now. Never ends."""
        rest, position = b"", 0
        while True:
            if self.path is not None and self.path.exists():
                with self.path.open("rb") as stream:
                    stream.seek(position)
                    rest += stream.read()
                    position = stream.tell()
            *lines, rest = rest.split(b"\n")
            for line in lines:
                yield from json.loads(line).items()
            yield "", None


class ChannelProgress(Progress):
    """Progress of one node; of a fast loop only what is newest every PAUSE_S, and what came last at `flush`."""

    def __init__(self, channel: ProgressChannel, node: str) -> None:
        self._channel, self._node = channel, node
        self._waiting: tuple[str, dict[str, Any]] | None = None
        self._spoke = 0.0

    def step(self, done: int, total: int, **values: float) -> None:
        self._tell("step", {"done": done, "total": total, "values": values})

    def note(self, text: str) -> None:
        self._tell("note", {"text": text})

    def _tell(self, kind: str, value: dict[str, Any]) -> None:
        self._waiting = (kind, {"node": self._node, **value})
        if time.monotonic() - self._spoke >= PAUSE_S:
            self.flush()

    def flush(self) -> None:
        """Tell what waits."""
        if self._waiting is not None:
            self._channel.tell(*self._waiting)
            self._waiting, self._spoke = None, time.monotonic()
