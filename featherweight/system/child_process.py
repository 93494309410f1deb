"""A process of our own that works for this one: what the two say to each other, and how the worker ends.

They speak in messages, each a JSON object on a line of its own: the child on standard output, which it keeps free of what
libraries print (`Channel.claim_stdout`), the parent on the child's standard input where it has something to say. An error goes
over as its kind and text (`failure`) and is raised on the other side as what it was (`error_of`). What else is said is the
callers' own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from featherweight import errors
from featherweight.errors import FeatherweightError, StageError, one_line
from featherweight.masking import masked
from featherweight.system.processes import end_children, end_with_parent

Message = dict[str, Any]
TAIL_BYTES, TAIL_LINES = 4000, 5
PATIENCE_S = 20.0


class Messages:
    """The messages in a stream of bytes that comes in pieces; lines that are none, a library's own words, are left out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[Message]:
        """The messages that `piece` completes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [json.loads(line) for line in lines if line.startswith(b"{")]


class Channel:
    """The child's way to its parent. `turn`: a file that the children of one parent lock in turn, so that no two speak at once."""

    def __init__(self, stream: BinaryIO, turn: Path | None = None) -> None:
        self._stream, self._turn = stream, turn

    @classmethod
    def claim_stdout(cls, turn: Path | None = None) -> Channel:
        """Standard output for messages alone: file descriptor 1, to which C++ writes as well, becomes standard error."""
        stream = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        return cls(stream, turn)

    def send(self, message: Message) -> None:
        """Send a message. Raises BrokenPipeError where nobody listens any more."""
        with _turn(self._turn):
            self._stream.write(json.dumps(message).encode() + b"\n")
            self._stream.flush()


@contextmanager
def _turn(file: Path | None) -> Iterator[None]:
    if file is None:
        yield
        return
    with file.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def failure(error: Exception) -> Message:
    """What a child says of an error; a divergence takes its losses along."""
    return {"kind": type(error).__name__, "text": one_line(error, 2000), "losses": list(getattr(error, "losses", ()))}


def error_of(told: Mapping[str, Any], doing: str = "") -> Exception:
    """The error that a child told of, as far as it is one of ours or tells of full memory. doing: words to put before its text."""
    kind, text = told["kind"], f"{doing}{told['text']}"
    if kind == "DivergenceError":
        return errors.DivergenceError(text, tuple(told["losses"]))
    if kind == "MemoryError":
        return MemoryError(text)
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, FeatherweightError):
        return known(text)
    unexpected = f"{doing}{kind}: {told['text']}"
    return StageError(unexpected) if doing else RuntimeError(unexpected)


class ChildProcess:
    """A child, and what it says. It leads a process group of its own, so that a Ctrl-C in the terminal does not reach it.

    dies_with_parent: Linux ends it when the thread that started it ends, however that happens.
    """

    def __init__(self, command: list[str], env: Mapping[str, str], *, dies_with_parent: bool = False) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=dict(env),
            start_new_session=True,
            preexec_fn=end_with_parent() if dies_with_parent else None,
        )
        assert self.process.stdin and self.process.stdout
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        self._messages, self._received = Messages(), list[Message]()

    def send(self, message: Message) -> None:
        """Say something to the child. Raises BrokenPipeError where it does not listen any more."""
        try:
            self._stdin.write(json.dumps(message).encode() + b"\n")
            self._stdin.flush()
        except ValueError as error:  # the pipe was closed on this side
            raise BrokenPipeError(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message, None where the child has ended its output. Raises TimeoutError after `timeout_s` of silence."""
        deadline = None if timeout_s is None else monotonic() + timeout_s
        while not self._received:
            left = None if deadline is None else max(0.0, deadline - monotonic())
            if not select.select([self._stdout], [], [], left)[0]:
                raise TimeoutError(f"no answer in {timeout_s:.0f} s")
            piece = os.read(self._stdout.fileno(), 1 << 20)
            if not piece:
                return None
            self._received += self._messages.feed(piece)
        return self._received.pop(0)

    def tail(self) -> str:
        """The last lines that the child and its own children wrote to standard error, as one line."""
        if self._stderr.closed:
            return "it was closed"
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = [" ".join(line.split()) for line in self._stderr.read().decode(errors="replace").splitlines()]
        said = " | ".join([line for line in lines if line][-TAIL_LINES:])
        return f"its last words: {masked(said)}" if said else "it said nothing"

    def ending(self) -> str:
        """How the child ended, in words, once it has."""
        code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        """End the child and all of its own at once."""
        if self.process.poll() is None:
            end_children(self.process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self, patience_s: float = PATIENCE_S) -> None:
        """End the child: ask by closing its standard input, insist after `patience_s`."""
        with contextlib.suppress(BrokenPipeError):  # what is left in the buffer has no reader any more
            self._stdin.close()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()
        self._stdout.close()
        self._stderr.close()
