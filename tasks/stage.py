"""`@stage`: what turns a pure function into a node of a flow.

The function knows files and a spec. All else stands around it: the cache key (cache_key.py), the Prefect task with its retries
and its cache (run_node.py), the MLflow nested run with the artifact, its manifest and the evidence of failures (nested_run.py),
and progress (live_progress.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from featherweight.progress import Metrics
from featherweight.recipe.nodes import Node
from featherweight.store.artifact import content_digest
from featherweight.system.device import CUDA
from tasks.cache_key import hardware, library_versions, made_by


@dataclass(frozen=True)
class Stage:
    """A stage's function and what its cache key must know beside the inputs.

    The function is called as `function(spec, *, out, seed, progress, **inputs)`: `inputs` are folders (Path) by name, `out` is
    an empty folder to fill, `progress` is a featherweight.progress.Progress; it returns a flat mapping of metrics. A function
    that names `scratch` gets a folder that outlives a kill, the same one for the same work and nothing else.

    One that names `inputs` gets its input folders in that one mapping, and runs with those that are there. One that names
    `parent` (the ParentRun) acts on what lies outside its folders, so its result is never taken from the cache; it may ask
    for `artifacts` too, the references (ArtifactRef) of its inputs by name.

    A stage is pickled by name, so that it can be sent to another process. One that is `native` hands its models to libraries that
    crash where they are wrong about them; on a GPU, whose addresses they may take for their own, it runs in a process of its own,
    as every stage does that is given a large checkpoint.
    """

    name: str
    function: Callable[..., Metrics]
    version: str
    libraries: tuple[str, ...]
    hardware: bool
    source: Callable[[Any], str | None] | None
    native: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Metrics:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[str, str], Stage], tuple[str, str]]:
        return _defined_at, (self.function.__module__, self.function.__name__)

    def takes(self, name: str) -> bool:
        """Whether the function has a parameter of that name."""
        return name in inspect.signature(self.function).parameters

    @property
    def gathers(self) -> bool:
        """Whether it runs with the inputs that are there, however many."""
        return self.takes("inputs")

    @property
    def acts(self) -> bool:
        """Whether it changes what lies outside its folders."""
        return self.takes("parent")

    def key(self, node: Node, digests: Mapping[str, str]) -> str:
        """The cache key of a node whose inputs have these digests (by input name)."""
        return content_digest(
            {
                "stage": self.name,
                "version": self.version,
                "code": made_by(self.function, node),
                "spec": node.spec.model_dump(mode="json"),
                "source": self.source(node.spec) if self.source else None,
                "inputs": dict(digests),
                "seed": node.seed,
                "libraries": library_versions(self.libraries),
                "hardware": hardware() if self.hardware else None,
                **({"device": node.device} if node.device == CUDA else {}),
            }
        )


def stage(
    name: str,
    *,
    version: str = "1",
    libraries: tuple[str, ...] = (),
    hardware: bool = False,
    source: Callable[[Any], str | None] | None = None,
    native: bool = False,
) -> Callable[[Callable[..., Metrics]], Stage]:
    """Declare a stage. Raise `version` whenever the function's result changes for the same input and the code does not show it.

    libraries: distributions whose version shapes the result. hardware: the result depends on this very machine.
    source: identity of what a spec names outside the artifacts (a checkpoint folder, a text file).
    """

    def wrap(function: Callable[..., Metrics]) -> Stage:
        return Stage(name, function, version, libraries, hardware, source, native)

    return wrap


def _defined_at(module: str, name: str) -> Stage:
    return getattr(import_module(module), name)
