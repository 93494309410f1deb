"""OpenVINO, loaded: a process of the toolchain's Python holds the graph, and is asked by this worker."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.opening import load_config
from featherweight.errors import StageError
from featherweight.model.architecture import family_of, task_of
from featherweight.model.heads import read_states
from featherweight.runtimes.batched import answered, scored
from featherweight.runtimes.build_process import other_python
from featherweight.runtimes.generation_settings import LENGTHS, PROCESSED, GenerationSettings, chosen_text
from featherweight.runtimes.interface import Generation, LoadedModel, Timing, Tokens, by_length
from featherweight.runtimes.openvino import serve
from featherweight.runtimes.speculation import speculation_of
from featherweight.spec import HEADED
from featherweight.system.child_process import ChildProcess
from featherweight.system.processes import peak_bytes
from featherweight.system.toolchains import python
from featherweight.text.examples import packed_inputs
from featherweight.text.model_inputs import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

MODEL = "openvino_model.xml"
"""As OpenVINO's own pipelines want it called."""
CONTINUOUS = "continuous"
GROUP = "32"
"""Activations that have a scale in common where they are rounded; what OpenVINO takes by default."""


class OpenvinoModel(LoadedModel):
    """One graph. options: `activations`, float or int8; `batching`, static or continuous; `speculation`.

    Another number of threads compiles it anew.
    """

    follows = PROCESSED
    child: ChildProcess | None = None

    def load(self) -> None:
        self.config: Any = load_config(self.served)
        self.family = family_of(self.config)
        command = [str(python("openvino")), str(Path(serve.__file__).resolve())]
        command += [str(self.weights / MODEL), json.dumps(properties(self.options, self.threads))]
        self.continuous = self.options.get("batching") == CONTINUOUS
        if self.continuous:
            command += ["--at-once", str(self.limits.max_batch), "--tokens", str(self.limits.max_tokens)]
        if asked := speculation_of(self.options):
            command += ["--draft-tokens", str(asked.tokens), "--ngram-size", str(asked.ngram_size)]
        self.child = ChildProcess(command, other_python(), dies_with_parent=True)
        self._answer("loading")

    def unload(self) -> None:
        if self.child is not None:
            self.child.close()
            self.child = None

    def peak_memory_bytes(self) -> int:
        """Of the process that computes; this one only hands on what is said."""
        return 0 if self.child is None else peak_bytes(self.child.process.pid)

    def _call(self, call: str, **told: Any) -> Any:
        assert self.child is not None
        try:
            self.child.send({"call": call, **told})
        except BrokenPipeError as error:
            raise StageError(f"OpenVINO has ended; {self.child.tail()}") from error
        return self._answer(call)

    def _answer(self, doing: str) -> Any:
        assert self.child is not None
        reply = self.child.receive()
        if reply is None:
            raise StageError(f"OpenVINO ended with {self.child.ending()} in {doing}; {self.child.tail()}")
        if "error" in reply:
            raise StageError(f"OpenVINO failed in {doing}: {reply['error']}")
        return reply["result"]

    def logprobs(self, windows: Tokens) -> list[list[float]]:
        return self.logprobs_given(windows, [[] for _ in windows])

    def logprobs_given(self, windows: Tokens, sources: Tokens) -> list[list[float]]:
        return scored(self.config, self.limits.max_tokens, windows, sources, self._score)

    def _score(self, inputs: Mapping[str, Any], labels: Tensor) -> list[list[float]]:
        wanted = labels.masked_fill(labels == IGNORED, serve.IGNORED)
        found: list[list[float]] = self._call("score", inputs={"input_ids": inputs["input_ids"].tolist()}, labels=wanted.tolist())
        return found

    def outputs(self, ids: Tokens, types: Tokens) -> list[list[list[float]]]:
        return answered(self.config, self.limits.max_batch, ids, types, self._answers)

    def _answers(self, ids: Tokens, types: Tokens) -> Tensor:
        inputs = packed_inputs(self.config, ids, types)
        told = {one: rows.tolist() for one, rows in inputs.items()}
        return read_states(self.config, _tensor(self._call("answers", inputs=told)), inputs)

    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        tokens: Tokens = [[] for _ in prompts]
        began, first = perf_counter(), 0.0
        if self.continuous:
            found = self._call("write", prompts=prompts, new_tokens=new_tokens, ends=[])
            return Generation(found["tokens"], Timing(found["first_s"], perf_counter() - began))
        for batch in by_length(prompts, self.limits.max_batch):
            some, before = [prompts[index] for index in batch], perf_counter() - began
            new, waited = self._fill(some) if self.family == "encoder" else self._greedy(some, new_tokens)
            first = before + waited if waited else perf_counter() - began
            for index, row in zip(batch, new, strict=True):
                tokens[index] = row
        return Generation(tokens, Timing(first, perf_counter() - began))

    def _greedy(self, prompts: Tokens, new_tokens: int) -> tuple[Tokens, float]:
        found = self._call("generate", prompts=prompts, new_tokens=new_tokens)
        return found["tokens"], found["first_s"]

    def _fill(self, ids: Tokens) -> tuple[Tokens, float]:
        """The likeliest token at every position; none where vectors or labels are answered."""
        if task_of(self.config) in HEADED:
            self._answers(ids, [[0] * len(row) for row in ids])
            return [[] for _ in ids], 0.0
        return self._call("likeliest", inputs={"input_ids": ids}), 0.0

    def write(self, prompts: Tokens, new_tokens: int, settings: GenerationSettings) -> Tokens:
        """Greedy text where only its end is asked for, else each token chosen by transformers' own processors of logits."""
        if set(settings.values) <= LENGTHS and self.continuous:
            tokens: Tokens = self._call("write", prompts=prompts, new_tokens=new_tokens, ends=settings.ends)["tokens"]
            return tokens
        if set(settings.values) <= LENGTHS:
            return self.generate(prompts, new_tokens).tokens
        return [chosen_text(self._behind(), prompt, new_tokens, settings) for prompt in prompts]

    def _behind(self) -> Callable[[list[int]], Tensor]:
        """The logits behind a text that is read piece by piece, from its first token on."""
        read = 0

        def logits(unread: list[int]) -> Tensor:
            nonlocal read
            told = self._call("next_logits", ids=[unread], past=read)
            read += len(unread)
            return _tensor(told)

        return logits


def properties(options: Mapping[str, str], threads: int) -> dict[str, Any]:
    """What OpenVINO's CPU plugin is told. By default it computes in bfloat16 where it can, and rounds activations and its cache.

    Keys and values stay in float32: scores come of one pass, which reads no cache, so that no gate would see what rounding costs.
    """
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if options.get("activations") == "int8" else "0",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # else two of its processes share a core while another idles
        "INFERENCE_NUM_THREADS": threads,
    }


def _tensor(told: Mapping[str, Any]) -> Tensor:
    """What `serve.packed` made of an array."""
    import torch

    values = torch.frombuffer(bytearray(base64.b64decode(told["float32"])), dtype=torch.float32)
    return values.reshape(told["shape"])
