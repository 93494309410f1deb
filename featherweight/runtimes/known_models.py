"""Which models an engine's converter knows, read from its source (importing it would import torch), and which it has otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@cache
def names_in(package: str, file: str, pattern: str) -> frozenset[str]:
    """What the group of `pattern` finds in a file of an installed package; nothing where there is no such package or file."""
    found = find_spec(package)
    for place in (found.submodule_search_locations or ()) if found else ():
        if (Path(place) / file).is_file():
            return frozenset(re.findall(pattern, (Path(place) / file).read_text(encoding="utf-8")))
    return frozenset()


@dataclass(frozen=True)
class Otherwise:
    """Where an engine has another model of a type than transformers has. when: of a configuration; always where None.

    why: with the places that `kind` and the configuration's values go into.
    """

    why: str
    when: Callable[[Any], bool] | None = None

    def refusal(self, kind: str, config: Any) -> str | None:
        """Why a model of that configuration is refused; None where it is not."""
        return None if self.when and not self.when(config) else self.why.format(kind=kind, config=config)


def otherwise_refusal(table: Mapping[str, Otherwise], kind: str, config: Any) -> str | None:
    """Why a model of type `kind` is refused by an engine's table of what it has otherwise; None where it is not."""
    return table[kind].refusal(kind, config) if kind in table else None
