"""Asking another Python what takes an import of transformers or torch to say, and keeping its answer in the user's cache."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from featherweight.errors import one_line
from featherweight.system.environment import without_secrets
from featherweight.system.kept import keep, kept
from featherweight.system.processes import end_with_parent


def asked(module: str, arguments: Sequence[str], key: str, given: str = "") -> dict[str, Any]:
    """What `python -m module arguments` answers in the last line that it prints, a JSON object; the one of before, where it was
    kept under `key`, or another process's. given: what it reads from its standard input.

    An answer with an `error` is not kept.
    """
    place = f"descriptions/{key}"
    if (known := kept(place, key)) is not None:
        return dict(known)
    surroundings: Any = {"env": without_secrets(), "preexec_fn": end_with_parent(), "input": given}
    command = [sys.executable, "-m", module, *arguments]
    told = _answer(subprocess.run(command, capture_output=True, text=True, check=False, **surroundings))
    if "error" not in told:
        keep(place, key, told)
    return told


def _answer(answer: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    try:
        told = json.loads(answer.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": one_line(answer.stderr[-300:])}
    return told if isinstance(told, dict) else {"error": one_line(answer.stdout)}
