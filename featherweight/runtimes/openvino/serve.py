"""A graph of OpenVINO's on this machine's CPU, asked in lines of JSON on standard input: {"call": NAME, ...}.

It is run by the toolchain's Python, which knows nothing of Featherweight: nothing but OpenVINO and NumPy is imported here. Each
answer is a line: {"result": ...} or {"error": ...}; the first says that the graph is ready.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

Say = Callable[..., None]
IGNORED = -100
"""The label of a position that is not scored, as in PyTorch."""
PAGE = 32
"""Tokens whose keys and values lie together, as OpenVINO's CPU plugin has it."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("graph", type=Path)
    parser.add_argument("properties", type=json.loads, help="of the CPU plugin, as a JSON object")
    parser.add_argument("--at-once", type=int, help="write texts by OpenVINO GenAI's scheduler, so many at once")
    parser.add_argument("--tokens", type=int, default=0, help="the longest of them, with its prompt")
    parser.add_argument("--draft-tokens", type=int, default=0, help="so many of their next tokens are drafted at once")
    parser.add_argument("--ngram-size", type=int, default=0, help="of the last tokens that have stood before")
    options = parser.parse_args()
    say = speaker()
    try:
        served = Served(options.graph, options.properties)
        if options.at_once:
            room = options.at_once, options.tokens, options.draft_tokens, options.ngram_size
            served = Continuous(options.graph, options.properties, *room)
        served.ready()
    except Exception as error:
        say(error=told(error))
        return 1
    say(result="ready")
    for line in sys.stdin:
        call = json.loads(line)
        try:
            say(result=getattr(served, call.pop("call"))(**call))
        except Exception as error:
            say(error=told(error))
    return 0


def speaker() -> Say:
    """Says things on standard output, which from now on libraries are kept from: what they print goes to standard error."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**said: object) -> None:
        print(json.dumps(said), file=stream, flush=True)

    return say


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


class Served:
    """A compiled graph. Its state, keys and values, is that of the texts that are being read."""

    def __init__(self, graph: Path, properties: Mapping[str, Any]) -> None:
        self.graph, self.properties = graph, dict(properties)

    def ready(self) -> None:
        """Load what answers."""
        self.request  # noqa: B018 - made when it is first asked for

    @cached_property
    def request(self) -> Any:
        """The graph as the CPU computes it."""
        import openvino

        return openvino.Core().compile_model(self.graph, "CPU", self.properties).create_infer_request()

    @cached_property
    def inputs(self) -> set[str]:
        """The names of what the graph reads."""
        return {name for port in self.request.get_compiled_model().inputs for name in port.names}

    @property
    def decodes(self) -> bool:
        """Whether the graph keeps keys and values."""
        return "beam_idx" in self.inputs

    def score(self, inputs: Mapping[str, Any], labels: list[list[int]]) -> list[list[float]]:
        """Log-probabilities of the labels that are not IGNORED; a decoder reads from the beginning."""
        import numpy

        self._forget()
        logits, wanted = self._pass(self._read(inputs)), numpy.array(labels)
        top = logits.max(-1)
        total = numpy.log(numpy.exp(logits - top[..., None]).sum(-1, dtype=numpy.float64))
        chosen = numpy.take_along_axis(logits, numpy.maximum(wanted, 0)[..., None], -1)[..., 0]
        found = chosen - top - total
        return [row[kept].tolist() for row, kept in zip(found, wanted != IGNORED, strict=True)]

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """Greedy, after prompts of one length: the new tokens, and the seconds until each text had its first."""
        import numpy

        self._forget()
        ids, past, began, first = numpy.array(prompts, dtype=numpy.int64), 0, perf_counter(), 0.0
        tokens = []
        for _ in range(new_tokens):
            logits = self._pass(self._steps(ids, past))[:, -1]
            past += ids.shape[1]
            ids = logits.argmax(-1)[:, None].astype(numpy.int64)
            tokens.append(ids)
            first = first or perf_counter() - began
        return {"tokens": numpy.concatenate(tokens, axis=1).tolist(), "first_s": first}

    def next_logits(self, ids: list[list[int]], past: int) -> dict[str, Any]:
        """Of the token behind `ids`, which follow `past` others that were read before; a past of 0 begins anew."""
        import numpy

        if not past:
            self._forget()
        return packed(self._pass(self._steps(numpy.array(ids, dtype=numpy.int64), past))[:, -1])

    def answers(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What an encoder answers to texts that are padded to one length."""
        return packed(self._pass(self._read(inputs)))

    def likeliest(self, inputs: Mapping[str, Any]) -> list[list[int]]:
        """The likeliest token, or label, at every position."""
        found: list[list[int]] = self._pass(self._read(inputs)).argmax(-1).tolist()
        return found

    def _read(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """All of a text at once; what is not told of it is that nothing is padding, and all of one kind."""
        import numpy

        given = {name: numpy.array(rows, dtype=numpy.int64) for name, rows in inputs.items()}
        ids = given["input_ids"]
        if self.decodes:
            return self._steps(ids, 0)
        return {"attention_mask": numpy.ones_like(ids), "token_type_ids": numpy.zeros_like(ids), **given}

    def _steps(self, ids: Any, past: int) -> dict[str, Any]:
        import numpy

        batch, tokens = ids.shape
        positions = numpy.arange(past, past + tokens, dtype=numpy.int64)
        return {
            "input_ids": ids,
            "attention_mask": numpy.ones((batch, past + tokens), dtype=numpy.int64),
            "position_ids": numpy.ascontiguousarray(numpy.broadcast_to(positions, ids.shape)),
            "beam_idx": numpy.arange(batch, dtype=numpy.int32),
        }

    def _pass(self, inputs: Mapping[str, Any]) -> Any:
        """The first output, float32, valid until the next pass."""
        told = {name: value for name, value in inputs.items() if name in self.inputs}
        return self.request.infer(told, share_inputs=True, share_outputs=True)[0]

    def _forget(self) -> None:
        if self.decodes:
            self.request.reset_state()


class Continuous(Served):
    """The same, its texts written by OpenVINO GenAI: pages of keys and values, and a text that ends makes room for the next.

    Scores come from the graph itself, which is loaded once one is asked for. draft_tokens: so many next tokens are drafted at once,
    those that followed the last `ngram_size` or fewer where they stood before.
    """

    def __init__(
        self, graph: Path, properties: Mapping[str, Any], at_once: int, tokens: int, draft_tokens: int = 0, ngram_size: int = 0
    ) -> None:
        super().__init__(graph, properties)
        self.draft_tokens, self.ngram_size = draft_tokens, ngram_size
        self.at_once, self.pages = at_once, at_once * (tokens // PAGE + 3)

    def ready(self) -> None:
        self.pipeline  # noqa: B018 - made when it is first asked for

    @cached_property
    def pipeline(self) -> Any:
        """GenAI's scheduler over the folder of the graph; it is given ids, and so needs no tokenizer."""
        import openvino_genai

        schedule = openvino_genai.SchedulerConfig()
        schedule.max_num_seqs, schedule.num_kv_blocks = self.at_once, self.pages
        # With it the second round of a measurement would skip the prompts that the first has read.
        schedule.enable_prefix_caching = False
        told = self.properties | ({"prompt_lookup": True} if self.draft_tokens else {})
        return openvino_genai.ContinuousBatchingPipeline(self.graph.parent, schedule, "CPU", told)

    def write(self, prompts: list[list[int]], new_tokens: int, ends: list[int]) -> dict[str, Any]:
        """Greedy, after prompts of any lengths, to an end or to `new_tokens`; the seconds until each text had its first."""
        import numpy
        import openvino
        import openvino_genai

        asked = openvino_genai.GenerationConfig()
        asked.max_new_tokens, asked.do_sample, asked.ignore_eos, asked.stop_token_ids = new_tokens, False, not ends, set(ends)
        if self.draft_tokens:
            asked.num_assistant_tokens, asked.max_ngram_size = self.draft_tokens, self.ngram_size
        began, first = perf_counter(), 0.0
        texts = [
            self.pipeline.add_request(at, openvino.Tensor(numpy.array([ids], dtype=numpy.int64)), asked)
            for at, ids in enumerate(prompts)
        ]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            if not first and all(text.can_read() for text in texts):
                first = perf_counter() - began
        return {"tokens": [list(text.read_all()[0].generated_ids) for text in texts], "first_s": first}


def packed(array: Any) -> dict[str, Any]:
    """An array of float32 in a line of JSON."""
    return {"shape": list(array.shape), "float32": base64.b64encode(array.astype("<f4").tobytes()).decode()}


if __name__ == "__main__":
    sys.exit(main())
