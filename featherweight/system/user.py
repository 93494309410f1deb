"""Who runs this."""

from __future__ import annotations

import getpass


def user_name() -> str:
    """The user that a history names."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
