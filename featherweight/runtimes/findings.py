"""A finding of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "missing"]
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One finding. `essential`: Featherweight cannot run a recipe while it is missing."""

    name: str
    state: State
    found: str
    remedy: str = ""
    essential: bool = False
