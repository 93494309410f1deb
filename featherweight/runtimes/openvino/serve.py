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
from pathlib import Path
from time import perf_counter
from typing import Any

Say = Callable[..., None]
IGNORED = -100
"""The label of a position that is not scored, as in PyTorch."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("graph", type=Path)
    parser.add_argument("properties", type=json.loads, help="of the CPU plugin, as a JSON object")
    options = parser.parse_args()
    say = speaker()
    try:
        served = Served(options.graph, options.properties)
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
        import openvino

        self.model = openvino.Core().compile_model(graph, "CPU", dict(properties))
        self.request = self.model.create_infer_request()
        self.inputs = {name for port in self.model.inputs for name in port.names}
        self.decodes = "beam_idx" in self.inputs

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


def packed(array: Any) -> dict[str, Any]:
    """An array of float32 in a line of JSON."""
    return {"shape": list(array.shape), "float32": base64.b64encode(array.astype("<f4").tobytes()).decode()}


if __name__ == "__main__":
    sys.exit(main())
