"""A progress that keeps what it is told."""

from __future__ import annotations

from featherweight.progress import Progress


class Notes(Progress):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Told(Notes):
    """Keeps the losses too; presses Ctrl-C at the step `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.stop_at = stop_at

    def step(self, done: int, total: int, **values: float) -> None:
        self.losses.append(values["loss"])
        if done == self.stop_at:
            raise KeyboardInterrupt
