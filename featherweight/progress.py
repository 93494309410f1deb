"""How a stage says how far it is: it calls, whoever runs it listens."""

from __future__ import annotations

from collections.abc import Mapping


class Progress:
    """The silent listener, and the interface of all others."""

    def step(self, done: int, total: int, **values: float) -> None:
        """`done` of `total` units of the stage's main loop are finished; `values` are live metrics such as `loss`."""

    def note(self, text: str) -> None:
        """One short line about what happens now, such as 'starting the vLLM server'."""


Metrics = Mapping[str, float]
