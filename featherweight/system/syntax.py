"""Reading Python source as a tree, in a process of several threads."""

from __future__ import annotations

import ast
import threading

from featherweight.system.lighter_imports import nothing_collected

_alone = threading.Lock()


def syntax_of(source: str) -> ast.Module:
    """`ast.parse`, by one thread at a time and with nothing collected meanwhile.

    A collection may call Python code, and with it let another thread parse: then Python 3.11 gives up, with "AST constructor
    recursion depth mismatch".
    """
    with _alone, nothing_collected():
        return ast.parse(source)
