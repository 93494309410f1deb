"""vLLM's server, imported once and forked for each checkpoint: run by the Python of vLLM's toolchain, which has none of our code.

Listens on a socket of this machine. A connection sends a line of JSON, the arguments and the environment of a server, with the
file that it is to write to; it is told the process that serves, and at its end the exit code and the CPU seconds that it took.
The server ends with the connection.

Usage: python vllm_fork.py SOCKET START, the file featherweight/runtimes/vllm/start.py
"""

from __future__ import annotations

import array
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
from typing import Any

WARM = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.model_loader.default_loader",
)
"""What a server imports on its way to the first answer."""


def main() -> None:
    """Import, say so, and fork for whoever connects."""
    for name in WARM:
        importlib.import_module(name)
    runpy.run_path(sys.argv[2])["import_once"]()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(sys.argv[1])
        listening.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _watch(connection)
            connection.close()


def _watch(connection: socket.socket) -> None:
    """In a process between, which ends the server with the connection, and tells how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    told, file = _received(connection)
    server = os.fork()
    if server == 0:
        os.setsid()
        _serve(told, file)
    connection.sendall(f"{server}\n".encode())
    threading.Thread(target=_end_with, args=(connection, server), daemon=True).start()
    _, status, used = os.wait4(server, 0)
    try:
        connection.sendall(f"{os.waitstatus_to_exitcode(status)} {used.ru_utime + used.ru_stime}\n".encode())
    finally:
        os._exit(0)


def _received(connection: socket.socket) -> tuple[dict[str, Any], int]:
    data, ancillary, _, _ = connection.recvmsg(1 << 20, socket.CMSG_SPACE(4))
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 20)
    files = array.array("i")
    files.frombytes(ancillary[0][2])
    return json.loads(data), files[0]


def _end_with(connection: socket.socket, server: int) -> None:
    if not connection.recv(1):
        os.killpg(server, signal.SIGKILL)


def _serve(told: dict[str, Any], file: int) -> None:
    for standard in (1, 2):
        os.dup2(file, standard)
    os.environ.clear()
    os.environ.update(told["environment"])
    sys.argv = ["vllm", *told["arguments"]]
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()
    os._exit(0)


if __name__ == "__main__":
    main()
