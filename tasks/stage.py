"""`@stage`: what turns a pure function into a node of a flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Stage:
    """A stage's function and what its cache key must know beside the inputs.

    The function is called as `function(spec, *, out, seed, progress, **inputs)`: `inputs` are folders (Path) by name, `out` is
    an empty folder to fill, `progress` is a featherweight.progress.Progress; it returns a flat mapping of metrics.
    """

    name: str
    function: Callable[..., Metrics]
    version: str
    libraries: tuple[str, ...]
    hardware: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Metrics:
        return self.function(*args, **kwargs)


def stage(
    name: str, *, version: str = "1", libraries: tuple[str, ...] = (), hardware: bool = False
) -> Callable[[Callable[..., Metrics]], Stage]:
    """Declare a stage. Raise `version` whenever the function's result changes for the same input.

    libraries: distributions whose version shapes the result. hardware: the result depends on this very machine.
    """

    def wrap(function: Callable[..., Metrics]) -> Stage:
        return Stage(name, function, version, libraries, hardware)

    return wrap
