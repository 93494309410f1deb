"""Tables that are kept once and copied: only whole ones, never over a database, never with anybody's runs in them."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from featherweight.system import fresh_tables


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database as a first start leaves it, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in fresh_tables.NAMED:
        monkeypatch.delenv(name, raising=False)
    database = tmp_path / "prefect.db"
    for name in ("flow_run", *(f"of_{number}" for number in range(20))):
        write(database, f"CREATE TABLE {name} (id)")
    return database


def write(database: Path, statement: str) -> None:
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute(statement)


def kept(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache" / "featherweight").iterdir()
    return file


def test_what_was_kept_is_placed_where_there_is_nothing(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    assert not fresh_tables.place(other)
    fresh_tables.keep(made)
    assert kept(tmp_path).stat().st_mode & 0o077 == 0
    assert fresh_tables.place(other)
    write(other, "INSERT INTO flow_run VALUES (1)")
    assert not fresh_tables.place(other)
    with closing(sqlite3.connect(other)) as opened:
        assert opened.execute("SELECT id FROM flow_run").fetchall() == [(1,)]


@pytest.mark.parametrize("harm", ["cut", "a run", "no tables", "named"])
def test_what_is_not_as_a_first_start_leaves_it_is_not_placed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    fresh_tables.keep(made)
    file = kept(tmp_path)
    if harm == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif harm == "a run":
        write(file, "INSERT INTO flow_run VALUES (1)")
    elif harm == "no tables":
        write(file, "DROP TABLE flow_run")
    else:
        monkeypatch.setenv(fresh_tables.NAMED[0], "postgresql+asyncpg://elsewhere/prefect")
    assert not fresh_tables.place(tmp_path / "other.db")
    assert not (tmp_path / "other.db").exists()


def test_a_cache_that_cannot_be_written_keeps_nothing(made: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    fresh_tables.keep(made)
    assert not fresh_tables.place(tmp_path / "other.db")
