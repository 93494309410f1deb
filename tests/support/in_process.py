"""An engine in the test's own process in place of a worker's: the same calls, without the seconds that a process takes to start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from featherweight.errors import StageError
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Limits, LoadedModel, Tokens
from featherweight.store.served_folder import Serving
from featherweight.text.tokens import Window


class InProcess:
    """What `open_worker` gives, as far as parity asks. Its errors come as a worker's do."""

    loaded: type[LoadedModel] | None = None
    """Stands in for the engine's own LoadedModel."""

    def __init__(
        self, served: Path, threads: int = 1, max_tokens: int = 512, max_batch: int = 8, batch_window_s: float = 0.0
    ) -> None:
        serving = Serving.read(served)
        loaded = self.loaded or RUNTIMES[serving.engine].loaded_model()
        self.model = loaded(served, serving, Limits(threads, max_tokens, max_batch, batch_window_s))

    def score(self, windows: Sequence[Window]) -> list[list[float]]:
        sources, ids = [window.source for window in windows], [window.ids for window in windows]
        try:
            return self.model.logprobs_given(ids, sources) if any(sources) else self.model.logprobs(ids)
        except Exception as error:
            raise StageError(f"failed while scoring: {type(error).__name__}: {error}") from error

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        try:
            return self.model.generate(prompts, new_tokens).tokens
        except Exception as error:
            raise StageError(f"failed while generating: {type(error).__name__}: {error}") from error

    def outputs(self, ids: Tokens, types: Tokens) -> list[list[list[float]]]:
        return self.model.outputs(ids, types)

    def answer(self, prompts: Tokens, new_tokens: int, settings: dict[str, Any], adapter: str | None = None) -> Tokens:
        self.model.take_adapter(adapter)
        return self.model.answer(prompts, new_tokens, settings)

    def adapt(self, name: str | None) -> None:
        self.model.take_adapter(name)

    def close(self) -> None:
        self.model.unload()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
