"""Which engines and servers this process has started, and by which lines, told by Python itself whenever it starts a program."""

from __future__ import annotations

import re
from typing import Any

PROGRAMS = {
    "engine": re.compile(r"featherweight\.runtimes\.\w*worker"),
    "server": re.compile(r"rclone serve|prefect server|mlflow (server|models serve)|uvicorn|gunicorn|bin/postgres"),
}
_seen: set[str] = set()
_lines: list[str] = []


def notice(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: keeps the kinds of the programs that are started."""
    if event == "subprocess.Popen":
        line = " ".join(map(str, arguments[1]))
        _lines.append(line)
        _seen.update(kind for kind, program in PROGRAMS.items() if program.search(line))


def lines() -> list[str]:
    """The command lines of the present test, which everybody on the machine can list."""
    return list(_lines)


def kinds() -> set[str]:
    """The kinds started since it was asked last."""
    found = set(_seen)
    _seen.clear()
    _lines.clear()
    return found
