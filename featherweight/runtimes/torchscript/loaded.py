"""What TorchScript traced, served: graphs for whole texts and for steps, their products packed for this CPU as they are loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.opening import load_config
from featherweight.errors import IntegrityError, StageError
from featherweight.runtimes.step_graph import StepGraphModel
from featherweight.runtimes.torchscript.build import MANIFEST, MODEL
from featherweight.store.artifact import file_sha256

if TYPE_CHECKING:
    from torch import Tensor

Cache = tuple[list[Any], list[Any]]


class TorchScriptModel(StepGraphModel):
    """The graphs in this process; threads are PyTorch's. options: `rounded`, of weights in integers."""

    def load(self) -> None:
        import torch

        told = json.loads((self.weights / MANIFEST).read_text())
        if file_sha256(self.weights / MODEL) != told["sha256"]:
            raise IntegrityError(f"{self.weights / MODEL} is not the file that was written; compile the variant again")
        if "rounded" in self.options:
            _require_products(told["saturates"])
        self.set_threads(self.threads)
        self.config: Any = load_config(self.served)
        self.layers: list[dict[str, int]] = told["layers"]
        others = ["read", "step"] if self.layers else ["read"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated
            module = torch.jit.load(str(self.weights / MODEL))
            self.graphs: Any = torch.jit.optimize_for_inference(module, other_methods=others)

    def set_threads(self, threads: int) -> None:
        import torch

        self.threads = threads
        torch.set_num_threads(threads)

    def call(self, ids: Tensor, seen: int, cache: Any, kept: Tensor, types: Tensor, lengths: Tensor) -> Tensor:
        import torch

        with torch.inference_mode(), _unspecialized():
            if not self.layers:
                return self.graphs.read(ids, types, lengths)
            places = torch.arange(seen, seen + ids.shape[1])
            if ids.shape[1] == 1:
                return self.graphs.step(ids, places, *cache)
            return self.graphs.read(ids, places, kept, *cache)

    def cache(self, batch: int, places: int) -> Cache:
        """All zeros: what no token looks at is multiplied by nothing, which must be a number."""
        import torch

        shapes = [(batch, layer["groups"], places, layer["width"], layer["value_width"]) for layer in self.layers]
        return [torch.zeros(*most, width) for *most, width, _ in shapes], [torch.zeros(*most, width) for *most, _, width in shapes]


@contextmanager
def _unspecialized() -> Iterator[None]:
    """Graphs run as they are written. By itself PyTorch makes others of them for the sizes that it meets first, which is no faster
    here, and takes as long as three texts do.
    """
    import torch

    before = torch._C._get_graph_executor_optimize()
    torch._C._set_graph_executor_optimize(False)
    try:
        yield
    finally:
        torch._C._set_graph_executor_optimize(before)


def _require_products(saturates: bool) -> None:
    """Raise StageError where this CPU's int8 products saturate, and those that were traced keep their inputs to no 7 bits."""
    from featherweight.runtimes.torch.linear import saturates as here

    if here() and not saturates:
        raise StageError(
            "this graph rounds to 8 bits, whose products saturate on a CPU without VNNI; optimize the model on this machine"
        )
