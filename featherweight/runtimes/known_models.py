"""Which models an engine's converter knows, read from its source: importing it would import torch."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def names_in(package: str, file: str, pattern: str) -> frozenset[str]:
    """What the group of `pattern` finds in a file of an installed package; nothing where there is no such package or file."""
    found = find_spec(package)
    for place in (found.submodule_search_locations or ()) if found else ():
        if (Path(place) / file).is_file():
            return frozenset(re.findall(pattern, (Path(place) / file).read_text(encoding="utf-8")))
    return frozenset()
