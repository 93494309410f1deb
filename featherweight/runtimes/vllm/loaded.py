"""vLLM: the real OpenAI-compatible server from its own toolchain, asked over HTTP by this worker."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.opening import load_config
from featherweight.errors import StageError
from featherweight.model.positions import head_width
from featherweight.runtimes.generation_settings import LENGTHS, GenerationSettings
from featherweight.runtimes.interface import Generation, LoadedModel, Timing, Tokens
from featherweight.runtimes.vllm.capabilities import disabled_kernels
from featherweight.system.device import Device
from featherweight.system.machine import gpus
from featherweight.system.processes import end_group, end_with_parent, free_port, tree_peak_bytes

if TYPE_CHECKING:
    import httpx

START_TIMEOUT_S = 600.0
# What ends a Python traceback, bare or behind the prefix of vLLM's logger.
_ERROR = re.compile(r"^(?:\(.*?\] )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.MULTILINE)

# Errors that only say that another one came before.
_ECHOES = ("EngineDeadError", "See root cause above")


class VllmModel(LoadedModel):
    """A server of this worker's own, in a process group of its own.

    options: `dtype`, float32 unless told otherwise; `kv_cache_dtype`, by default the same; `tensor_parallel_size`, 1.
    """

    follows = LENGTHS | {"do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "min_new_tokens"}
    server: subprocess.Popen[bytes] | None = None

    def load(self) -> None:
        import httpx

        from featherweight.system.toolchains import python

        port = free_port()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        self.server = subprocess.Popen(
            [str(python("vllm")), "-m", "vllm.entrypoints.openai.api_server", *self._arguments(port)],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=self._environment(),
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )
        # Proxies of the environment are for the world outside; the server is on this machine.
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=None, trust_env=False)
        self._wait_until_ready()

    def served_on(self) -> Device:
        """vLLM's build knows one device only, and `device_refusal` has seen to it that it is this one."""
        return self.device

    def _arguments(self, port: int) -> list[str]:
        options = {
            "--model": self.weights,
            "--tokenizer": self.served,
            "--served-model-name": "served",
            "--dtype": self.options.get("dtype", "float32"),
            # Scoring asks for one new token, which nobody reads, after a window that may fill the context.
            "--max-model-len": self.limits.max_tokens + 1,
            "--max-num-seqs": self.limits.max_batch,
            # The checkpoint's own settings come with each request that follows them; a measurement follows none.
            "--generation-config": "vllm",
            "--kv-cache-dtype": self.options.get("kv_cache_dtype", "auto"),
            "--kv-cache-memory-bytes": _cache_bytes(self.weights, self.limits.max_tokens + 1, self.limits.max_batch),
            "--tensor-parallel-size": self.options.get("tensor_parallel_size", "1"),
            "--host": "127.0.0.1",
            "--port": port,
        }
        # With the prefix cache the second round of a measurement would skip the prompts that the first has read.
        flags = ["--enforce-eager", "--no-enable-prefix-caching", "--disable-log-stats"]
        return [str(part) for pair in options.items() for part in pair] + flags

    def _environment(self) -> dict[str, str]:
        count, disabled = str(self.threads), disabled_kernels(self.options.get("compute_type"), gpus())
        return os.environ | {
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            # "nobind" takes OMP_NUM_THREADS; the default would pin threads to cores that other processes may be using.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # The engine computes in its own process instead of starting one more: 25 s until ready instead of 45.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            **({"VLLM_DISABLED_KERNELS": disabled} if disabled else {}),
        }

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
        log = self.log.read().decode(errors="replace")
        errors = [error for error in _ERROR.findall(log) if not any(echo in error for echo in _ECHOES)]
        lines = errors or [line for line in log.splitlines() if line.strip()]
        return f"it said: {' '.join(lines[-1].split())[:400]}" if lines else "it said nothing"

    def unload(self) -> None:
        if self.server is not None:
            end_group(self.server)
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
        values, sampled = settings.values, settings.values.get("do_sample", False)
        body = {
            "model": "served",
            "prompt": prompts,
            "max_tokens": new_tokens,
            "temperature": values.get("temperature", 1.0) if sampled else 0,
            "top_k": values.get("top_k", 50) if sampled else 0,
            "top_p": values.get("top_p", 1.0) if sampled else 1.0,
            "repetition_penalty": values.get("repetition_penalty", 1.0),
            "min_tokens": min(values.get("min_new_tokens", 0), new_tokens),
            "stop_token_ids": settings.ends,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        choices = self._checked(self.client.post("/v1/completions", json=body)).json()["choices"]
        tokens: Tokens = [[] for _ in prompts]
        for choice in choices:
            tokens[choice["index"]] = list(choice["token_ids"])
        return tokens

    def peak_memory_bytes(self) -> int:
        """Sum over the server's processes; pages that they share are counted in each."""
        return 0 if self.server is None else tree_peak_bytes(self.server.pid)


def _choices(response: httpx.Response) -> Any:
    """The choices in a stream of server-sent events."""
    for line in response.iter_lines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise StageError(f"vLLM broke off: {event['error']}")
            yield from (choice for choice in event["choices"] if choice.get("token_ids"))


def _cache_bytes(folder: Path, max_tokens: int, max_batch: int) -> int:
    """A key-value cache that holds the batch twice over, in blocks of 128 tokens and float32, at least 64 MiB."""
    config = load_config(folder).get_text_config()  # which knows GPT-2's n_head and BLOOM's n_layer by these names, too
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token = 2 * 4 * config.num_hidden_layers * heads * (head_width(config) or 0)
    blocks = max_batch * -(-max_tokens // 128) + 2
    return max(2 * blocks * 128 * per_token, 2**26)
