"""Asking another Python what takes an import of transformers or torch to say, and keeping its answer in the user's cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from featherweight.errors import one_line
from featherweight.system.environment import without_secrets
from featherweight.system.processes import end_with_parent
from featherweight.system.user import cache_folder


def asked(module: str, arguments: Sequence[str], key: str, given: str = "") -> dict[str, Any]:
    """What `python -m module arguments` answers in the last line that it prints, a JSON object; the one of before, where it was
    kept under `key`, or another process's. given: what it reads from its standard input.

    An answer with an `error` is not kept.
    """
    kept = cache_folder() / "descriptions" / f"{key}.json"
    with suppress(OSError, ValueError):  # nobody asked before, or was stopped while writing
        return dict(json.loads(kept.read_text()))
    surroundings: Any = {"env": without_secrets(), "preexec_fn": end_with_parent(), "input": given}
    command = [sys.executable, "-m", module, *arguments]
    told = _answer(subprocess.run(command, capture_output=True, text=True, check=False, **surroundings))
    if "error" not in told:
        with suppress(OSError):  # a home that cannot be written to costs the time again, no more
            kept.parent.mkdir(parents=True, exist_ok=True)
            written = kept.with_suffix(f".{os.getpid()}")
            written.write_text(json.dumps(told))
            written.replace(kept)
    return told


def _answer(answer: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    try:
        told = json.loads(answer.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": one_line(answer.stderr[-300:])}
    return told if isinstance(told, dict) else {"error": one_line(answer.stdout)}
