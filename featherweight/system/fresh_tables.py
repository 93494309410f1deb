"""The tables of a fresh Prefect database: 80 migrations, 6 CPU seconds; made once a user and version, copied from then on."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from featherweight.system.user import cache_folder

NAMED = ("PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL")


def place(database: Path) -> bool:
    """Put the kept tables where there is no database yet; whether that was done."""
    kept = _kept()
    if any(name in os.environ for name in NAMED) or database.exists() or not _sound(kept):
        return False
    with tempfile.NamedTemporaryFile(dir=database.parent, suffix=".db") as copy:
        copy.write(kept.read_bytes())
        copy.flush()
        try:
            os.link(copy.name, database)
        except FileExistsError:
            return False
    return True


def keep(database: Path) -> None:
    """Keep the tables of a database that nothing but Prefect's start has written to."""
    kept = _kept()
    if not database.exists() or _sound(kept):
        return
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder, closing(sqlite3.connect(database)) as source:
            copy = Path(folder, kept.name)
            source.execute("VACUUM INTO ?", (str(copy),))
            copy.chmod(0o600)
            copy.rename(kept)
    except (OSError, sqlite3.Error):
        return  # a home that cannot be written to: the next workspace makes its tables itself


def _kept() -> Path:
    """The file of this user, and of this version of Prefect."""
    return cache_folder() / f"tables-of-prefect-{version('prefect')}.db"


def _sound(kept: Path) -> bool:
    """Whether a kept file is there, ours, whole, and holds tables and no run."""
    try:
        if kept.stat().st_uid != os.getuid():
            return False
        with closing(sqlite3.connect(f"{kept.as_uri()}?mode=ro", uri=True)) as opened:
            whole = opened.execute("PRAGMA quick_check").fetchone() == ("ok",)
            return whole and not opened.execute("SELECT count(*) FROM flow_run").fetchone()[0]
    except (OSError, sqlite3.Error):
        return False
