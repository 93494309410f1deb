"""vLLM's own server for a cell, forked from one that has been imported (vllm_fork.py): a second of work instead of twelve."""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featherweight.errors import ToolchainError
from featherweight.runtimes.vllm.loaded import VllmModel
from featherweight.system.processes import end_group, end_with_parent
from featherweight.system.toolchains import python

ROOT = Path(__file__).resolve().parents[1]
START = ROOT / "featherweight" / "runtimes" / "vllm" / "start.py"
SOCKET = "CONFORMANCE_VLLM_SOCKET"
"""Names the socket to the processes of the cells."""


@contextmanager
def forking() -> Iterator[None]:
    """While it lasts, cells have their servers forked. Without the toolchain there is nothing to fork."""
    try:
        toolchain = python("vllm")
    except ToolchainError:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/socket"
        command = [str(toolchain), str(Path(__file__).with_name("vllm_fork.py")), address, str(START)]
        with Path(folder, "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(),
                start_new_session=True,
                preexec_fn=end_with_parent(),
            )
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise SystemExit(f"vLLM cannot be imported: {Path(folder, 'log').read_text()[-400:]}")
        os.environ[SOCKET] = address
        try:
            yield
        finally:
            del os.environ[SOCKET]
            end_group(process)


def _environment() -> dict[str, str]:
    """What vLLM reads as it is imported; each server is given its own before it starts."""
    told = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    told |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    return os.environ | told


def is_forking() -> bool:
    """Whether a server can be forked here."""
    return SOCKET in os.environ


class Server:
    """What VllmModel asks of the process that it starts."""

    spent_s = 0.0
    """CPU seconds of all servers of this process that have ended."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Any) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(os.environ[SOCKET])
        told = json.dumps({"arguments": arguments, "environment": environment}).encode() + b"\n"
        self.connection.sendmsg([told], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [log.fileno()]))])
        self.pid = int(self.connection.recv(100))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        try:
            return self.wait(0.001)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                ending = self.connection.recv(100).decode().split()
            except TimeoutError as error:
                raise subprocess.TimeoutExpired("vllm", timeout or 0) from error
            self.returncode = int(ending[0])
            Server.spent_s += float(ending[1])
        return self.returncode


def cpu_seconds() -> float:
    """What the servers of this process took that have ended."""
    return Server.spent_s


class ForkedVllm(VllmModel):
    """As the product has it, but for where its server comes from."""

    def _start(self, told: list[str], surroundings: dict[str, str]) -> Any:
        return Server(told, surroundings | {"HF_HUB_OFFLINE": "1"}, self.log)
