"""The client's side: `open_worker` starts a served variant's engine in a process of its own and speaks to it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

from featherweight.errors import StageError, ToolchainError
from featherweight.measure.batching import Batching
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Acceptance, Generation, Timing, Tokens, alike
from featherweight.store.served_folder import Serving, require_verified, verified_tokens
from featherweight.system import device
from featherweight.system.child_process import ChildProcess, Message, error_of
from featherweight.system.device import CUDA, Device, cuda_refusal
from featherweight.system.environment import without_secrets
from featherweight.text.tokens import Window

START_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 1800.0


def open_worker(
    served: Path, threads: int, max_tokens: int | None = None, max_batch: int = 8, batch_window_s: float = 0.0
) -> Worker:
    """Start the engine that `served/serving.json` names, with `threads` threads, and wait until it is ready.

    max_tokens: longest sequence (prompt and new tokens, or scored window), by default what was verified.
    max_batch: most sequences generated at once. batch_window_s: how long those of several calls wait for others to join them.
    Raises ToolchainError where this machine has no such engine, StageError where it does not start, or where the folder was
    verified for shorter sequences only.
    """
    return Worker(served, threads, max_tokens or verified_tokens(served), max_batch, batch_window_s)


class Worker:
    """A running engine, closed by `close()` or at the end of a `with`. `startup_s` is the time until it was ready.

    Several threads may call at once: texts that they ask for (`answer`, `outputs`) are answered together, other calls take turns.
    device: where the engine says that it serves from.
    """

    def __init__(self, served: Path, threads: int, max_tokens: int, max_batch: int, batch_window_s: float) -> None:
        serving = Serving.read(served)
        self.engine = serving.engine
        require_verified(serving, max_tokens)
        if reason := RUNTIMES[self.engine].missing():
            raise ToolchainError(f"{self.engine} cannot run here: {reason}")
        if serving.device == CUDA and (reason := cuda_refusal()):
            raise ToolchainError(f"this model was verified on a GPU and is served from one, and {reason}")
        self.max_tokens, self.max_batch, self.threads = max_tokens, max_batch, threads
        began = monotonic()
        command = [*_command(served.resolve()), *_limits(threads, max_tokens, max_batch, batch_window_s)]
        self._child = ChildProcess(command, environment(threads))
        self._numbers, self._turn, self._reading = count(), threading.Condition(), False
        self._replies: dict[int, Message] = {}
        try:
            self.device: Device = self._result(self._receive(START_TIMEOUT_S, "starting"), "starting")
            if self.device != serving.device:
                raise StageError(f"{self.engine} serves from {self.device}, and was to serve from {serving.device}")
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

    def outputs(self, ids: Tokens, types: Tokens) -> list[list[list[float]]]:
        """What an encoder answers to each sequence, rows of numbers. See LoadedModel.outputs."""
        longest = max(map(len, ids), default=0)
        if longest > self.max_tokens:
            raise StageError(f"the worker was opened for sequences of {self.max_tokens} tokens, not for {longest}")
        found: list[list[list[float]]] = [[] for _ in ids]
        for batch in alike(ids, self.max_batch):
            rows = self._call("outputs", [ids[index] for index in batch], [types[index] for index in batch])
            for index, row in zip(batch, rows, strict=True):
                found[index] = row
        return found

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        """Greedy continuations of exactly `new_tokens` tokens; the end-of-text token stops none. See LoadedModel.generate."""
        return self._generation(prompts, new_tokens).tokens

    def answer(self, prompts: Tokens, new_tokens: int, settings: dict[str, Any], adapter: str | None = None) -> Tokens:
        """What follows each prompt, as a checkpoint's generation settings ask for it. See LoadedModel.answer and adapt."""
        self._require_room(prompts, new_tokens)
        tokens: Tokens = self._call("answer", prompts, new_tokens, settings, adapter)
        return tokens

    def under_load(
        self,
        prompts: Tokens,
        new_tokens: int,
        times_s: Sequence[float],
        patience_s: float,
        batching: Batching,
        *,
        headed: bool = False,
    ) -> list[tuple[float | None, float | None]]:
        """When each prompt, asked for at its time, had its first token, and when its last. See LoadedModel.under_load."""
        self._require_room(prompts, new_tokens, at_once=1)
        longest_s = max(times_s, default=0.0) + patience_s + CALL_TIMEOUT_S
        told = prompts, new_tokens, times_s, patience_s, batching.max_batch, batching.window_s, headed
        found = self._call("under_load", *told, timeout_s=longest_s)
        return [(first, last) for first, last in found]

    def adapt(self, name: str | None) -> None:
        """Answer from now on with the adapter of that name, None for the model alone. See LoadedModel.adapt."""
        self._call("take_adapter", name)

    def time(self, prompts: Tokens, new_tokens: int) -> Timing:
        """Time one generation of a batch."""
        return self._generation(prompts, new_tokens).timing

    def set_threads(self, threads: int) -> None:
        """Go on with another number of threads (an engine that cannot switch loads itself anew)."""
        if threads != self.threads:
            self._call("set_threads", threads)
            self.threads = threads

    def acceptance(self) -> Acceptance | None:
        """See LoadedModel.acceptance."""
        found = self._call("acceptance")
        return Acceptance(**found) if found else None

    def attention(self) -> dict[str, str]:
        """See LoadedModel.attention."""
        found: dict[str, str] = self._call("attention")
        return found

    def peak_memory_bytes(self) -> int:
        """Peak resident memory of the serving process or processes, since they started."""
        return self._call("peak_memory_bytes")

    def peak_gpu_memory_bytes(self) -> int | None:
        """Peak of the GPUs' memory that they held, since they started. See LoadedModel.peak_gpu_memory_bytes."""
        return self._call("peak_gpu_memory_bytes")

    def peak_tensor_bytes(self) -> int | None:
        """See LoadedModel.peak_tensor_bytes."""
        return self._call("peak_tensor_bytes")

    def _generation(self, prompts: Tokens, new_tokens: int) -> Generation:
        self._require_room(prompts, new_tokens)
        reply = self._call("generate", prompts, new_tokens)
        return Generation(reply["tokens"], Timing(**reply["timing"]))

    def _require_room(self, prompts: Tokens, new_tokens: int, at_once: int | None = None) -> None:
        wanted, together = max(len(ids) for ids in prompts) + new_tokens, at_once or len(prompts)
        if wanted > self.max_tokens or together > self.max_batch:
            raise StageError(
                f"the worker was opened for {self.max_batch} sequences of {self.max_tokens} tokens, not for {together} of {wanted}"
            )

    def _call(self, name: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        with self._turn:
            number = next(self._numbers)
            try:
                self._child.send({"id": number, "name": name, "arguments": arguments})
            except BrokenPipeError as error:
                raise self._died(name) from error
        return self._result(self._reply(number, timeout_s or CALL_TIMEOUT_S, name), name)

    def _reply(self, number: int, timeout_s: float, doing: str) -> Message:
        """The reply to a call. One of the threads that wait for one reads for all of them."""
        with self._turn:
            while number not in self._replies:
                if self._reading:
                    self._turn.wait()
                    continue
                self._reading = True
                self._turn.release()
                try:
                    reply = self._receive(timeout_s, doing)
                finally:
                    self._turn.acquire()
                    self._reading = False
                    self._turn.notify_all()
                self._replies[reply["id"]] = reply
            return self._replies.pop(number)

    def _receive(self, timeout_s: float, doing: str) -> Message:
        """The next reply; what comes instead of one becomes one clear error."""
        try:
            reply = self._child.receive(timeout_s)
        except TimeoutError as error:
            self._child.kill()
            raise StageError(f"{self.engine} hung while {_doing(doing)}: {error}; {self._child.tail()}") from error
        except ValueError as error:  # another thread has closed it
            raise self._died(doing) from error
        if reply is None:
            raise self._died(doing)
        return reply

    def _result(self, reply: Message, doing: str) -> Any:
        if "error" in reply:
            raise error_of(reply["error"], f"{self.engine} failed while {_doing(doing)}: ")
        return reply["result"]

    def _died(self, doing: str) -> StageError:
        self._child.kill()
        return StageError(f"{self.engine} died while {_doing(doing)} ({self._child.ending()}); {self._child.tail()}")

    @property
    def pid(self) -> int:
        """The process that holds the engine."""
        return self._child.process.pid

    @property
    def alive(self) -> bool:
        """Whether its process still runs."""
        return self._child.process.poll() is None

    def cpu_s(self) -> float:
        """Processor time of its process so far, and of those that it started and that have ended."""
        import psutil

        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system + times.children_user + times.children_system

    def close(self) -> None:
        """End the process: ask first, insist after a while."""
        self._child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def environment(threads: int) -> dict[str, str]:
    """The process environment of an engine: its threads, set before any library loads, its GPU; no network, and no password."""
    count = str(threads)
    return (
        without_secrets()
        | device.visible()
        | {
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "OPENBLAS_NUM_THREADS": count,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DO_NOT_TRACK": "1",
        }
    )


def _command(served: Path) -> list[str]:
    return [sys.executable, "-m", "featherweight.runtimes.worker", str(served), "--parent", str(os.getpid())]


def _limits(threads: int, max_tokens: int, max_batch: int, batch_window_s: float) -> list[str]:
    told = {"threads": threads, "max-tokens": max_tokens, "max-batch": max_batch, "batch-window-s": batch_window_s}
    return [word for name, value in told.items() for word in (f"--{name}", str(value))]


def _doing(name: str) -> str:
    return {
        "logprobs": "scoring",
        "logprobs_given": "scoring",
        "generate": "generating",
        "answer": "generating",
        "outputs": "answering",
    }.get(name, name)
