"""Bars that libraries draw by themselves: what is done is told by featherweight.progress alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hidden_bars() -> Iterator[None]:
    """None of tqdm's is drawn, whoever makes it."""
    from tqdm import tqdm

    shown: Any = tqdm.__init__

    def hidden(bar: Any, *args: Any, **options: Any) -> None:
        shown(bar, *args, **(options | {"disable": True}))

    setattr(tqdm, "__init__", hidden)  # noqa: B010 - mypy knows no method that is given another value
    try:
        yield
    finally:
        setattr(tqdm, "__init__", shown)  # noqa: B010
