"""Cache keys know the project's own code, which is read once a process."""

from __future__ import annotations

from tasks import cache_key, code_slice


def forget() -> None:
    """What was read of the project's own code, as in a new process."""
    for cached in (code_slice.read_module, code_slice.file_of, code_slice.definition, code_slice.state_of_files):
        cached.cache_clear()
    cache_key.code_digest.cache_clear()
