"""What can be made again at some cost, kept for this user between processes: a JSON file a name, of one state."""

from __future__ import annotations

import json
import os
from typing import Any

from featherweight.system.user import cache_folder


def kept(name: str, state: Any) -> Any:
    """What was kept under a name in that state, by this user; None where there is nothing, or it is of another state."""
    try:
        with (cache_folder() / f"{name}.json").open(encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            known, value = json.load(file)
        return value if known == state else None
    except (OSError, ValueError, TypeError):
        return None


def keep(name: str, state: Any, value: Any) -> None:
    """Keep it, where this user's cache can be written to. state, value: as JSON has them."""
    file = cache_folder() / f"{name}.json"
    copy = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        copy.write_text(json.dumps([state, value]), encoding="utf-8")
        copy.replace(file)
    except OSError:
        return
