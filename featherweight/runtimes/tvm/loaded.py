"""What TVM compiled, served: one function for prompts, steps and whole texts, and a cache that it writes into."""

from __future__ import annotations

import json
from importlib import import_module
from time import perf_counter
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.opening import load_config
from featherweight.model.architecture import family_of, task_of
from featherweight.model.heads import read
from featherweight.runtimes.batched import answered, label_logprobs, scored
from featherweight.runtimes.interface import Generation, LoadedModel, Timing, Tokens, by_length
from featherweight.runtimes.tvm.build import LIBRARY, MANIFEST, PARAMETERS
from featherweight.runtimes.tvm.library import opened, require
from featherweight.spec import HEADED
from featherweight.system.machine import describe
from featherweight.text.examples import packed_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy import ndarray
    from torch import Tensor

PLACES = 64
"""A cache holds a multiple of so many places (kernels.LANES)."""


class TvmModel(LoadedModel):
    """The compiled library in this process, with TVM's runtime alone; threads are those of its pool."""

    def load(self) -> None:
        from safetensors.numpy import load_file

        told = json.loads((self.weights / MANIFEST).read_text())
        require(told["made_for"], describe())
        self.tvm = opened(self.threads)
        self.config: Any = load_config(self.served)
        self.shape: dict[str, int] = told["cache"]
        self.set_threads(self.threads)
        library = self.tvm.runtime.load_module(str(self.weights / LIBRARY))
        # Its pool keeps a block for each size that ever was, and texts come in many lengths.
        machine = import_module("tvm.runtime.vm").VirtualMachine(library, self.tvm.cpu(), memory_cfg="naive")
        self.function = machine["main"]
        arrays = load_file(self.weights / PARAMETERS)
        self.parameters = [self.tvm.runtime.tensor(arrays.pop(name)) for name in told["parameters"]]

    def set_threads(self, threads: int) -> None:
        """Of its pool, which takes another number in place; the 1 asks for fast cores first, to which nothing binds them here."""
        self.threads = threads
        self.tvm.get_global_func("runtime.config_threadpool")(1, threads)

    def logprobs(self, windows: Tokens) -> list[list[float]]:
        return self.logprobs_given(windows, [[] for _ in windows])

    def logprobs_given(self, windows: Tokens, sources: Tokens) -> list[list[float]]:
        return scored(self.config, self.limits.max_tokens, windows, sources, self._score)

    def _score(self, inputs: Mapping[str, Any], labels: Tensor) -> list[list[float]]:
        import torch

        return label_logprobs(torch.from_numpy(self._read(inputs["input_ids"].numpy())), labels)

    def outputs(self, ids: Tokens, types: Tokens) -> list[list[list[float]]]:
        return answered(self.config, self.limits.max_batch, ids, types, self._answers)

    def _answers(self, ids: Tokens, types: Tokens) -> Tensor:
        import numpy
        import torch
        from transformers.modeling_outputs import ModelOutput

        inputs = packed_inputs(self.config, ids, types)
        given = {name: tensor.numpy() for name, tensor in inputs.items()}
        lengths = numpy.array([len(row) for row in ids])
        found = torch.from_numpy(self._read(given["input_ids"], given.get("token_type_ids"), lengths))
        name = "last_hidden_state" if task_of(self.config) == "feature-extraction" else "logits"
        return read(self.config, ModelOutput({name: found}), inputs)

    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        import numpy

        tokens: Tokens = [[] for _ in prompts]
        began, first = perf_counter(), 0.0
        for batch in by_length(prompts, self.limits.max_batch):
            some = numpy.array([prompts[index] for index in batch], dtype=numpy.int64)
            new, moment = self._greedy(some, new_tokens) if family_of(self.config) == "causal" else self._fill(some)
            first = moment - began
            for index, row in zip(batch, new.tolist(), strict=True):
                tokens[index] = row
        return Generation(tokens, Timing(first, perf_counter() - began))

    def _greedy(self, ids: ndarray, new_tokens: int) -> tuple[ndarray, float]:
        """[batch, prompt] -> ([batch, new_tokens], the moment at which the first of them was there)."""
        import numpy

        batch, tokens = ids.shape
        cache, new, first, seen = self._cache(batch, tokens + new_tokens), [], 0.0, 0
        for _ in range(new_tokens):
            logits = self._call(ids, seen, cache, kept=numpy.array([ids.shape[1] - 1]))
            seen += ids.shape[1]
            ids = logits[:, -1].argmax(-1)[:, None]
            first = first or perf_counter()
            new.append(ids)
        return numpy.concatenate(new, axis=1), first

    def _fill(self, ids: ndarray) -> tuple[ndarray, float]:
        """The likeliest token at every position; none where vectors or labels are answered."""
        if task_of(self.config) in HEADED:
            self._answers(ids.tolist(), [[0] * ids.shape[1]] * len(ids))
            return ids[:, :0], perf_counter()
        return self._read(ids).argmax(-1), perf_counter()

    def _read(self, ids: ndarray, types: ndarray | None = None, lengths: ndarray | None = None) -> ndarray:
        """What the model answers at every position of whole texts, [batch, tokens, width]; lengths: of each without padding."""
        import numpy

        batch, tokens = ids.shape
        bounds = numpy.full(batch, 0 if family_of(self.config) == "causal" else tokens) if lengths is None else lengths
        return self._call(ids, 0, self._cache(batch, tokens), kept=numpy.arange(tokens), types=types, bounds=bounds)

    def _call(
        self,
        ids: ndarray,
        seen: int,
        cache: tuple[Any, Any],
        *,
        kept: ndarray,
        types: ndarray | None = None,
        bounds: ndarray | None = None,
    ) -> ndarray:
        """Logits of the new tokens `kept`, behind `seen` ones of each sequence (see graph.Step)."""
        import numpy

        positions = numpy.arange(seen, seen + ids.shape[1])[None]
        bounds = numpy.full(len(ids), seen) if bounds is None else bounds
        given = [ids, numpy.zeros_like(ids) if types is None else types, positions, kept, bounds]
        tensors = [self.tvm.runtime.tensor(numpy.ascontiguousarray(one, dtype=numpy.int64)) for one in given]
        return self.function(*tensors, *cache, *self.parameters).numpy()

    def _cache(self, batch: int, tokens: int) -> tuple[Any, Any]:
        """Keys and values of so many sequences, not yet written."""
        places = -(-tokens // PLACES) * PLACES
        layers, groups = self.shape["layers"], self.shape["groups"]
        keys, values = self.shape["width"], self.shape["value_width"]
        empty = self.tvm.runtime.empty
        return empty((layers, batch, groups, keys, places), "float32"), empty((layers, batch, groups, places, values), "float32")
