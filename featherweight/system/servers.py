"""Servers of any kind: is one there, start one, wait for it, end it."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import urlparse

from featherweight.errors import ServiceError
from featherweight.system.processes import end_group, end_with_parent

LOCAL = "127.0.0.1"
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def check_url(url: str, what: str, variable: str) -> None:
    """Raise ServiceError where nobody listens at an http(s) URL, or at a database's that is on another machine."""
    parsed = urlparse(url)
    usual = PORTS.get(parsed.scheme.partition("+")[0])
    socket_file = not parsed.netloc and not parsed.scheme.startswith("http")
    if usual is None or socket_file:
        return
    try:
        host, port = parsed.hostname or "", parsed.port or usual
    except ValueError:  # which tells a part of the password, so it is not told on
        escape = "write the /, @, : and % of a password as %2F, %40, %3A and %25"
        raise ServiceError(f"{variable} is not an address ({url}); {escape}") from None
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ServiceError(f"the {what} server at {url} does not answer ({reason}); start it or unset {variable}") from error


def start(command: list[str], log: Path, environment: dict[str, str], user: str | None = None) -> subprocess.Popen[bytes]:
    """Start a server that a Ctrl-C in the terminal does not reach, and that dies with this process however that ends.

    environment: changes to ours; '' takes a name out. user: who runs it, where that is not who we are.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **environment}
    env = {name: value for name, value in env.items() if value != ""}
    with log.open("ab") as stream:
        return subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
            user=user,
            cwd="/" if user else None,
            preexec_fn=end_with_parent(),
        )


def await_url(url: str, process: subprocess.Popen[bytes], what: str, log: Path, timeout_s: float = 300) -> None:
    """Wait until a server answers; raises ServiceError with the end of its log once it has ended, or has not answered for so long.

    On a machine with much else to do Prefect's took more than 120 s.
    """
    import httpx

    deadline = time.monotonic() + timeout_s
    with httpx.Client(timeout=5) as client:  # one, as each reads all certificates there are
        while time.monotonic() < deadline:
            try:
                if client.get(url).status_code < 500:
                    return
            except httpx.HTTPError:
                if process.poll() is not None:
                    break
            time.sleep(0.1)
    tail = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
    late = "" if process.poll() is not None else f" within {timeout_s:.0f} s"
    raise ServiceError(f"the {what} server did not start{late}; see {log}{': ' + tail[0] if tail else ''}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and its children."""
    if process.poll() is None:
        end_group(process)


def require_free(ports: dict[str, int]) -> None:
    """Raise ServiceError that names every port, by what is to listen there, on which somebody listens already."""
    taken = []
    for name, port in ports.items():
        with socket.socket() as probe:
            if probe.connect_ex((LOCAL, port)) == 0:
                taken.append(f"{port} ({name})")
    if taken:
        raise ServiceError(f"somebody listens on port {', '.join(taken)} already; end that, or give other ports (--help)")
