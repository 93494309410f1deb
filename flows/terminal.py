"""The terminal: what is written there is text, whoever wrote it."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

from featherweight.visible import visible

if TYPE_CHECKING:
    from rich.console import Console


def spare_surrogates() -> None:
    """Let what no encoding has be written escaped: names of files may hold bytes that are no text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def at_once(line: str) -> None:
    """Say on a terminal what is being done, before the libraries for it are imported.

    Not where no one looks on: there a refusal is the one line on standard error.
    """
    if sys.stderr.isatty() and not {"--json", "--quiet", "-q"} & set(sys.argv):
        print(visible(line), file=sys.stderr, flush=True)


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A rich console to whose cells and lines a control character is a text."""
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(visible(text, kept="\n"), **options)

    return Plain(stderr=stderr, width=width)
