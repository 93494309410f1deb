"""Texts of others as they may be shown: on a terminal and in a log a control character is a command, not a letter.

Names of files, tags, reasons and whatever else somebody wrote elsewhere go through `visible` (one line) or `in_lines`. JSON needs
neither: it writes them escaped.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's classes of what acts and is not seen: control and format characters, halves of surrogate pairs, ends of lines."""


def visible(text: object, kept: str = "") -> str:
    r"""A text in one line: control and format characters and lone surrogates as `repr` shows them (\n, \x1b, \u202e, \udc80).

    kept: characters that stay as they are.
    """
    said = str(text)
    if said.isprintable():
        return said
    return "".join(repr(one)[1:-1] if unicodedata.category(one) in _UNSEEN and one not in kept else one for one in said)


def in_lines(lines: Iterable[object]) -> str:
    """Lines of a text that is shown; none of them holds an end of line of its own, whatever it tells of."""
    return "\n".join(map(visible, lines))
