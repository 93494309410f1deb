"""A stage's progress, told to whoever follows the plan and to the stage's MLflow run while it lasts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from featherweight.progress import Progress
from featherweight.system.progress_channel import ChannelProgress

if TYPE_CHECKING:
    from mlflow import MlflowClient


class LiveProgress(Progress):
    """Hands progress on, and writes live values to the MLflow run about once a second."""

    def __init__(self, listener: ChannelProgress, client: MlflowClient, run_id: str) -> None:
        self._listener, self._client, self._run_id = listener, client, run_id
        self._pending: list[tuple[str, float, int, int]] = []
        self._flushed = time.monotonic()

    def step(self, done: int, total: int, **values: float) -> None:
        self._listener.step(done, total, **values)
        stamp = int(time.time() * 1000)
        self._pending += [(f"live_{name}", float(value), stamp, done) for name, value in values.items()]
        if time.monotonic() - self._flushed > 1:
            self._log()

    def note(self, text: str) -> None:
        self._listener.note(text)

    def flush(self) -> None:
        """Tell and write what is pending."""
        self._listener.flush()
        self._log()

    def _log(self) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(self._pending), 500):
            chunk = self._pending[start : start + 500]
            self._client.log_batch(self._run_id, [Metric(*item) for item in chunk])
        self._pending.clear()
        self._flushed = time.monotonic()
