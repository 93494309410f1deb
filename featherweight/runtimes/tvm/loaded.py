"""What TVM compiled, served: one function for prompts, steps and whole texts, and a cache that it writes into."""

from __future__ import annotations

import json
from importlib import import_module
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.opening import load_config
from featherweight.model.architecture import family_of
from featherweight.runtimes.code_levels import require
from featherweight.runtimes.step_graph import StepGraphModel
from featherweight.runtimes.tvm.build import LIBRARY, MANIFEST, PARAMETERS
from featherweight.runtimes.tvm.library import opened
from featherweight.system.machine import describe

if TYPE_CHECKING:
    from torch import Tensor


class TvmModel(StepGraphModel):
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

    def call(self, ids: Tensor, seen: int, cache: Any, kept: Tensor, types: Tensor, lengths: Tensor) -> Tensor:
        """See graph.Step: a decoder's bounds are where its new tokens begin, an encoder's where its texts end."""
        import torch

        positions = torch.arange(seen, seen + ids.shape[1])[None]
        bounds = torch.full_like(lengths, seen) if family_of(self.config) == "causal" else lengths
        given = [ids, types, positions, kept, bounds]
        tensors = [self.tvm.runtime.tensor(one.contiguous().numpy()) for one in given]
        return torch.from_numpy(self.function(*tensors, *cache, *self.parameters).numpy())

    def cache(self, batch: int, places: int) -> tuple[Any, Any]:
        layers, groups = self.shape["layers"], self.shape["groups"]
        keys, values = self.shape["width"], self.shape["value_width"]
        empty = self.tvm.runtime.empty
        return empty((layers, batch, groups, keys, places), "float32"), empty((layers, batch, groups, places, values), "float32")
