"""What AOTInductor compiled, served: its graphs for whole texts and for steps, over weights that are mapped from their file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.opening import load_config
from featherweight.errors import StageError
from featherweight.model.architecture import family_of
from featherweight.runtimes.code_levels import require
from featherweight.runtimes.step_graph import StepGraphModel
from featherweight.runtimes.torch_aoti import constants
from featherweight.runtimes.torch_aoti.build import KNOWN_VECTORS, MANIFEST, WEIGHTS
from featherweight.system.machine import describe

if TYPE_CHECKING:
    from torch import Tensor

Cache = tuple[list[Any], list[Any]]


class AotiModel(StepGraphModel):
    """The packages in this process; threads are PyTorch's."""

    def load(self) -> None:
        import torch
        from torch._inductor import aoti_load_package, config

        told = json.loads((self.weights / MANIFEST).read_text())
        require(told["made_for"], describe())
        require_torch(told["torch"], torch.__version__)
        self.set_threads(self.threads)
        self.config: Any = load_config(self.served)
        self.layers: list[dict[str, int]] = told["layers"]
        self.store = constants.read(self.weights / WEIGHTS)
        self.graphs: dict[str, Any] = {}
        self.held: dict[str, dict[str, Tensor]] = {}  # the graphs do not keep their tensors alive
        for name, views in told["constants"].items():
            self.held[name] = constants.viewed(views, self.store)
            with config.patch(KNOWN_VECTORS):
                self.graphs[name] = aoti_load_package(str(self.weights / f"{name}.pt2"), run_single_threaded=True)
            self.graphs[name].load_constants(self.held[name], check_full_update=True, user_managed=True)

    def set_threads(self, threads: int) -> None:
        import torch

        self.threads = threads
        torch.set_num_threads(threads)

    def call(self, ids: Tensor, seen: int, cache: Any, kept: Tensor, types: Tensor, lengths: Tensor) -> Tensor:
        """The graphs read their inputs as if they lay without gaps, and do not ask."""
        import torch

        ids = ids.contiguous()
        with torch.inference_mode():
            if family_of(self.config) == "encoder":
                return self.graphs["read"](ids, types.contiguous(), lengths)
            places = torch.arange(seen, seen + ids.shape[1])
            if ids.shape[1] == 1:
                return self.graphs["step"](ids, places, *cache)
            return self.graphs["read"](ids, places, kept, *cache)

    def cache(self, batch: int, places: int) -> Cache:
        """All zeros: what no token looks at is multiplied by nothing, which must be a number."""
        import torch

        shapes = [(batch, layer["groups"], places, layer["width"], layer["value_width"]) for layer in self.layers]
        return [torch.zeros(*most, width) for *most, width, _ in shapes], [torch.zeros(*most, width) for *most, _, width in shapes]


def require_torch(made_with: str, here: str) -> None:
    """Raise StageError where another PyTorch than this one compiled the graphs: what they call in it may be gone."""
    if made_with != here:
        raise StageError(f"torch {made_with} compiled this model, and torch {here} is here; install that one, or optimize it anew")
