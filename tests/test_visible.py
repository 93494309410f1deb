"""Texts of others on a terminal: nothing in them moves its cursor, ends a line, or keeps it from being written."""

from __future__ import annotations

import io

import pytest

from featherweight.errors import StageError, one_line
from featherweight.visible import in_lines, visible
from flows.terminal import console

HOSTILE = "a\nok  all\x1b[2J\r\x9b\u202e\u2028\udc80\x00b"
SHOWN = r"a\nok  all\x1b[2J\r\x9b\u202e\u2028\udc80\x00b"


@pytest.mark.parametrize("plain", ["", "naïve → 3\u00a0%", "モデル 🦙", r"a\b"])
def test_what_is_no_command_stays(plain: str) -> None:
    assert visible(plain) == plain


def test_what_acts_on_a_terminal_is_shown_as_repr_shows_it() -> None:
    assert visible(HOSTILE) == SHOWN
    assert in_lines([HOSTILE, 3]) == f"{SHOWN}\n3"
    assert visible("a\nb\x1b", kept="\n") == "a\nb\\x1b"
    assert one_line(StageError("failed \x1b]0;title\x07 at \udcff\n  twice")) == r"failed \x1b]0;title\x07 at \udcff twice"


def test_a_table_of_rich_shows_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("name")
    table.add_row("\x1b[31mred\udc80")
    shown = console(width=80)
    shown.file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    shown.print(table)
    shown.print("\x1b[31mred\udc80")
    shown.file.seek(0)
    said = shown.file.read()
    assert said.count(r"\x1b[31mred\udc80") == 2 and "\x1b" not in said
