"""A progress that keeps what it is told."""

from __future__ import annotations

from featherweight.progress import Progress


class Notes(Progress):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
