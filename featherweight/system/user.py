"""Who runs this, and where what can be made again is kept for them."""

from __future__ import annotations

import getpass
import os
from pathlib import Path


def user_name() -> str:
    """The user that a history names."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def cache_folder() -> Path:
    """This user's folder for what all workspaces share and anybody can make again; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featherweight"
