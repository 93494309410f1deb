"""The client's side: `open_worker` starts a served variant's engine in a process of its own and speaks to it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

from featherweight.errors import CheckpointError, StageError, ToolchainError
from featherweight.runtimes.catalog import engine_available
from featherweight.runtimes.interface import Generation, Timing, Tokens
from featherweight.store.served_folder import Serving
from featherweight.system.processes import end_children
from featherweight.text.tokens import Window

START_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 1800.0
_KINDS = {"ToolchainError": ToolchainError, "CheckpointError": CheckpointError}


def open_worker(served: Path, threads: int, max_tokens: int = 512, max_batch: int = 8) -> Worker:
    """Start the engine that `served/serving.json` names, with `threads` threads, and wait until it is ready.

    max_tokens: longest sequence (prompt and new tokens, or scored window). max_batch: most sequences generated at once.
    Raises ToolchainError where this machine has no such engine, StageError where it does not start.
    """
    return Worker(served, threads, max_tokens, max_batch)


class Worker:
    """A running engine, closed by `close()` or at the end of a `with`. `startup_s` is the time until it was ready."""

    def __init__(self, served: Path, threads: int, max_tokens: int, max_batch: int) -> None:
        self.engine = Serving.read(served).engine
        if reason := engine_available(self.engine):
            raise ToolchainError(f"{self.engine} cannot run here: {reason}")
        self.max_tokens, self.max_batch, self.threads = max_tokens, max_batch, threads
        began = monotonic()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [*_command(served.resolve()), *_limits(threads, max_tokens, max_batch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment(threads),
            start_new_session=True,
        )
        self._buffer = b""
        try:
            self._receive(START_TIMEOUT_S, "starting")
        except BaseException:
            self.close()
            raise
        self.startup_s = monotonic() - began

    def logprobs(self, windows: Tokens, sources: Tokens | None = None) -> list[list[float]]:
        """Natural-log probabilities of ids[1:] of each window given their prefixes, from the engine itself.

        sources: those of the windows of a seq2seq model or an encoder (see featherweight.text.tokens.Window).
        """
        longest = max((len(ids) for ids in (*windows, *(sources or ()))), default=0)
        if longest > self.max_tokens or any(len(ids) < 2 for ids in windows):
            raise StageError(f"windows must hold 2 to {self.max_tokens} tokens to be scored; the longest has {longest}")
        return self._call("logprobs_given", windows, sources) if sources else self._call("logprobs", windows)

    def score(self, windows: Sequence[Window]) -> list[list[float]]:
        """`logprobs` of windows of any family."""
        sources = [window.source for window in windows]
        return self.logprobs([window.ids for window in windows], sources if any(sources) else None)

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        """Greedy continuations of exactly `new_tokens` tokens; the end-of-text token stops none. See LoadedModel.generate."""
        return self._generation(prompts, new_tokens).tokens

    def time(self, prompts: Tokens, new_tokens: int) -> Timing:
        """Time one generation of a batch."""
        return self._generation(prompts, new_tokens).timing

    def set_threads(self, threads: int) -> None:
        """Go on with another number of threads (an engine that cannot switch loads itself anew)."""
        if threads != self.threads:
            self._call("set_threads", threads)
            self.threads = threads

    def peak_memory_bytes(self) -> int:
        """Peak resident memory of the serving process or processes, since they started."""
        return self._call("peak_memory_bytes")

    def _generation(self, prompts: Tokens, new_tokens: int) -> Generation:
        wanted = max(len(ids) for ids in prompts) + new_tokens
        if wanted > self.max_tokens or len(prompts) > self.max_batch:
            raise StageError(
                f"the worker was opened for {self.max_batch} sequences of {self.max_tokens} tokens, "
                f"not for {len(prompts)} of {wanted}"
            )
        reply = self._call("generate", prompts, new_tokens)
        return Generation(reply["tokens"], Timing(**reply["timing"]))

    def _call(self, name: str, *arguments: Any) -> Any:
        line = json.dumps({"name": name, "arguments": arguments}) + "\n"
        assert self._process.stdin
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self._died(name) from error
        return self._receive(CALL_TIMEOUT_S, name)

    def _receive(self, timeout_s: float, doing: str) -> Any:
        """The result of the next reply; whatever else comes instead of it becomes one clear error."""
        line = self._line(timeout_s, doing)
        reply = json.loads(line)
        if "error" in reply:
            raise _KINDS.get(reply["kind"], StageError)(f"{self.engine} failed while {_doing(doing)}: {reply['error']}")
        return reply["result"]

    def _line(self, timeout_s: float, doing: str) -> bytes:
        assert self._process.stdout
        stdout, deadline = self._process.stdout.fileno(), monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if not select.select([stdout], [], [], max(0.0, deadline - monotonic()))[0]:
                self._kill()
                raise StageError(f"{self.engine} hung while {_doing(doing)}: no answer in {timeout_s:.0f} s; {self._tail()}")
            chunk = os.read(stdout, 1 << 20)
            if not chunk:
                raise self._died(doing)
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _died(self, doing: str) -> StageError:
        self._kill()
        code = self._process.returncode
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        return StageError(f"{self.engine} died while {_doing(doing)} ({how}); {self._tail()}")

    def _tail(self) -> str:
        """The last lines that the worker wrote to stderr, as one line."""
        if self._stderr.closed:
            return "it was closed"
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - 4000))
        lines = [" ".join(line.split()) for line in self._stderr.read().decode(errors="replace").splitlines()]
        said = " | ".join([line for line in lines if line][-5:])
        return f"its last words: {said}" if said else "it said nothing"

    def _kill(self) -> None:
        if self._process.poll() is None:
            end_children(self._process.pid)
            self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process: ask by closing its stdin, insist after 20 s."""
        assert self._process.stdin and self._process.stdout
        self._close_stdin()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._kill()
        self._process.stdout.close()
        self._stderr.close()

    def _close_stdin(self) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # what is left in the buffer has no reader any more
            self._process.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def environment(threads: int) -> dict[str, str]:
    """The process environment of an engine: its threads, set before any library loads, and no network."""
    count = str(threads)
    return os.environ | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
    }


def _command(served: Path) -> list[str]:
    return [sys.executable, "-m", "featherweight.runtimes.worker", str(served), "--parent", str(os.getpid())]


def _limits(threads: int, max_tokens: int, max_batch: int) -> list[str]:
    return ["--threads", str(threads), "--max-tokens", str(max_tokens), "--max-batch", str(max_batch)]


def _doing(name: str) -> str:
    return {"logprobs": "scoring", "logprobs_given": "scoring", "generate": "generating"}.get(name, name)
