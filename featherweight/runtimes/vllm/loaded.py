"""vLLM: the real OpenAI-compatible server from its own toolchain, asked over HTTP by this worker."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING, Any

from featherweight.errors import StageError
from featherweight.runtimes.generation_settings import LENGTHS, GenerationSettings
from featherweight.runtimes.interface import Generation, LoadedModel, Timing, Tokens
from featherweight.runtimes.line import ENDLESSLY, LOOK_S, NOW, Ask, Line, Written, side_by_side
from featherweight.runtimes.vllm.server import arguments, environment, sampling
from featherweight.system.device import Device
from featherweight.system.processes import GroupWatch, end_with_parent, held_port, tree_peak_bytes
from featherweight.system.toolchains import python

if TYPE_CHECKING:
    import httpx

START_TIMEOUT_S = 600.0
MOST_OPEN = 1000
"""Requests that its server is asked at once; it answers `max_batch` of them together, and has the others wait."""
# What ends a Python traceback, bare or behind the prefix of vLLM's logger. An assertion often says nothing but itself.
_LOGGED = r"^(?:\(.*?\] )?"
_ERROR = re.compile(
    rf"{_LOGGED}((?:\w+\.)*\w*(?:Error|Exception): (?:\d+ validation errors? for .+\n)?.+)$"
    rf"|{_LOGGED} +(?P<asserted>assert .+)\n(?:{_LOGGED}[ ^~]+\n)?{_LOGGED}AssertionError *$",
    re.MULTILINE,
)

# Errors that only say that another one came before.
_ECHOES = ("EngineDeadError", "See root cause above")


class VllmModel(LoadedModel):
    """A server of this worker's own, in a process group of its own.

    options: `dtype`, float32 unless told otherwise; `kv_cache_dtype`, by default the same; `tensor_parallel_size`, 1.
    It follows what vLLM's server for users can be told to follow (server.engine_server), and so no least length of a text.
    """

    follows = (LENGTHS - {"forced_eos_token_id"}) | {"do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}
    server: subprocess.Popen[bytes] | None = None

    def load(self) -> None:
        import httpx

        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        with held_port() as port:
            self.server = self._start(self._arguments(port), os.environ | environment(self.options, self.threads))
            self.watch = GroupWatch(self.server)
            # Proxies of the environment are for the world outside; the server is on this machine.
            many = httpx.Limits(max_connections=MOST_OPEN)
            self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=None, trust_env=False, limits=many)
            self._wait_until_ready()

    def _start(self, told: list[str], surroundings: dict[str, str]) -> subprocess.Popen[bytes]:
        """The server, leader of a process group, which writes what it says to `self.log`."""
        return subprocess.Popen(
            [str(python("vllm")), str(Path(__file__).with_name("start.py")), *told],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=surroundings,
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )

    def served_on(self) -> Device:
        """vLLM's build knows one device only, and `device_refusal` has seen to it that it is this one."""
        return self.device

    def _arguments(self, port: int) -> list[str]:
        # Scoring asks for one new token, which nobody reads, after a window that may fill the context.
        room = replace(self.limits, max_tokens=self.limits.max_tokens + 1)
        # The checkpoint's own settings come with each request that follows them; a measurement follows none.
        told = ["--served-model-name", "served", "--generation-config", "vllm", "--host", "127.0.0.1", "--port", str(port)]
        # With the prefix cache the second round of a measurement would skip the prompts that the first has read.
        return [*arguments(self.served, self.weights, self.options, room), *told, "--no-enable-prefix-caching"]

    def _wait_until_ready(self) -> None:
        import httpx

        deadline = monotonic() + START_TIMEOUT_S
        while monotonic() < deadline:
            if self.server is None or self.server.poll() is not None:
                raise StageError(f"the vLLM server did not start; {self._said()}")
            try:
                if self.client.get("/health", timeout=2.0).is_success:
                    return
            except httpx.TransportError:
                sleep(0.1)
        said = self._said()
        self.unload()
        raise StageError(f"the vLLM server was not ready after {START_TIMEOUT_S:.0f} s; {said}")

    def _said(self) -> str:
        """The root error in the server's log, else its last line."""
        self.log.seek(0)
        return said(self.log.read().decode(errors="replace"))

    def unload(self) -> None:
        if self.server is not None:
            self.watch.end()
            self.server = None
            self.client.close()
            self.log.close()

    def logprobs(self, windows: Tokens) -> list[list[float]]:
        scores: list[list[float]] = []
        for start in range(0, len(windows), self.limits.max_batch):
            scores += self._score(windows[start : start + self.limits.max_batch])
        return scores

    def _score(self, windows: Tokens) -> list[list[float]]:
        """prompt_logprobs gives, for each token but the first, {id: {"logprob", ...}} with the likeliest beside it."""
        body = {"model": "served", "prompt": windows, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        choices = self._checked(self.client.post("/v1/completions", json=body)).json()["choices"]
        rows: list[list[float]] = [[] for _ in windows]
        for choice in choices:
            ids, given = windows[choice["index"]], choice["prompt_logprobs"]
            rows[choice["index"]] = [given[place][str(token)]["logprob"] for place, token in enumerate(ids) if place > 0]
        return rows

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.is_error:
            answer = " ".join(response.read().decode().split())[:300]
            raise StageError(f"vLLM answered {response.status_code}: {answer}; {self._said()}")
        return response

    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        """One streamed request for the whole batch; the time to first token ends when every prompt has its first."""
        body = {
            "model": "served",
            "prompt": prompts,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }
        tokens: Tokens = [[] for _ in prompts]
        waiting, first, began = len(prompts), 0.0, perf_counter()
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            self._checked(response)
            for choice in _choices(response):
                row = tokens[choice["index"]]
                waiting -= not row
                row += choice["token_ids"]
                first = first or (0.0 if waiting else perf_counter() - began)
        total = perf_counter() - began
        if any(len(row) != new_tokens for row in tokens):
            raise StageError(f"vLLM gave {[len(row) for row in tokens]} new tokens instead of {new_tokens} each")
        return Generation(tokens, Timing(first, total))

    def write(self, prompts: Tokens, new_tokens: int, settings: GenerationSettings) -> Tokens:
        """One request for all, in which the server stops each text at its end."""
        body = self._body(prompts, new_tokens, settings)
        choices = self._checked(self.client.post("/v1/completions", json=body)).json()["choices"]
        tokens: Tokens = [[] for _ in prompts]
        for choice in choices:
            tokens[choice["index"]] = list(choice["token_ids"])
        return tokens

    def _body(self, prompts: Tokens, new_tokens: int, settings: GenerationSettings) -> dict[str, Any]:
        """What its server is asked."""
        return {
            "model": "served",
            "prompt": prompts,
            "max_tokens": new_tokens,
            **sampling(settings),
            "stop_token_ids": settings.ends,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    def converse(self, line: Line) -> None:
        """Each text is a request of its own, and the server lets it join those that it is writing."""

        def take(idle: bool) -> list[Ask]:
            ask = line.next(until=ENDLESSLY if idle else NOW)
            return [ask] if ask else []

        most = MOST_OPEN if line.most >= self.limits.max_batch else int(line.most)
        side_by_side(line, most, take, lambda batch: self._stream(batch[0], line))

    def _stream(self, ask: Ask, line: Line) -> Written | None:
        """The text of a request; None where it did not begin in time."""
        import httpx

        wanted, first = GenerationSettings(dict(ask.settings)), None
        if reason := wanted.refusal(self.follows, type(self).__name__):
            raise StageError(reason)
        body = self._body([ask.prompt], ask.new_tokens, wanted) | {"stream": True}
        patience = httpx.Timeout(None, read=max(LOOK_S, ask.until - line.now) if ask.until < math.inf else None)
        tokens: list[int] = []
        try:
            with self.client.stream("POST", "/v1/completions", json=body, timeout=patience) as response:
                for choice in _choices(self._checked(response)):
                    first = line.now if first is None else first
                    if first > ask.until:  # what is read no more the server writes no more
                        return None
                    tokens += choice["token_ids"]
        except httpx.ReadTimeout:
            return None
        last = line.now
        return Written([wanted.cut(tokens, ask.new_tokens)], last if first is None else first, last)

    def peak_memory_bytes(self) -> int:
        """Sum over the server's processes; pages that they share are counted in each."""
        return 0 if self.server is None else tree_peak_bytes(self.server.pid)


def said(log: str) -> str:
    """What a server's log ends with: its root error, else its last line."""
    found = (f"AssertionError: {one['asserted']}" if one["asserted"] else one[1] for one in _ERROR.finditer(log))
    errors = [error for error in found if not any(echo in error for echo in _ECHOES)]
    lines = errors or [line for line in log.splitlines() if line.strip()]
    return f"it said: {' '.join(lines[-1].split())[:400]}" if lines else "it said nothing"


def _choices(response: httpx.Response) -> Any:
    """The choices in a stream of server-sent events."""
    for line in response.iter_lines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise StageError(f"vLLM broke off: {event['error']}")
            yield from (choice for choice in event["choices"] if choice.get("token_ids"))
