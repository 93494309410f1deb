"""A folder to deploy: a version's verified files, and the command that checks them once more and serves them as measured."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featherweight.errors import RecipeError
from featherweight.registry.lineage import read_graph
from featherweight.registry.registry import Registry
from featherweight.registry.serving.backend import server_of
from featherweight.registry.serving.verified_copy import VerifiedCopy
from featherweight.store.artifact import file_sha256
from featherweight.visible import visible

PLACE = "./model"
MODEL, START, SUMS, FACTS = "model", "start", "SHA256SUMS", "deployment.json"
PORT = 8080
SERVER_BYTES = 2**30
"""Memory of the server around the engine, which the measurement leaves out: MLflow, pandas and the tokenizer."""
HEADROOM = 1.25
FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
"""Ends with 1 where a package is not installed, without importing it."""


@dataclass(frozen=True)
class Deployment:
    """A registered version as it is to be served. command: its first word is Python; `./model` in it is the folder's sub-folder.

    memory_bytes: what was measured, with the server and some room. digest: of the served artifact. start: sha256 of the script.
    """

    model: str
    version: str
    variant: str
    engine: str
    digest: str
    device: str
    threads: int
    batch: int
    max_tokens: int
    memory_bytes: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    example: tuple[str, Mapping[str, Any]]
    metrics: Mapping[str, float] = field(default_factory=dict)
    start: str = ""
    batch_window_s: float = 0.0

    @property
    def reference(self) -> str:
        """As commands take it."""
        return f"{self.model}/{self.version}"

    @property
    def head(self) -> str:
        """What a comment tells of it, in one line whatever it is called."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return visible(f"{self.reference}: {self.variant} on {self.engine}, {threads}")

    @property
    def batches(self) -> str:
        """How requests are answered together, in words."""
        waiting = f" that wait {1000 * self.batch_window_s:g} ms for others" if self.batch_window_s else ""
        return f"batches of up to {self.batch}{waiting}"


def deployment_of(registry: Registry, copy: VerifiedCopy) -> Deployment:
    """How a verified version is served, by the settings that it was measured with.

    Raises ToolchainError without its engine, RecipeError for one that answers right from here alone.
    """
    version, socket = copy.version, Path("socket")
    server = server_of(copy, socket)
    if server.here_alone:
        raise RecipeError(f"{version.model}/{version.version} cannot be deployed: {server.here_alone}; serve it so")
    words = [word.replace(str(copy.folder), PLACE) for word in server.command[1:]]
    at = words.index("--uds")
    graph = read_graph(registry, version)
    metrics = graph.metrics
    return Deployment(
        model=version.model,
        version=version.version,
        variant=graph.variant,
        engine=copy.serving.engine,
        digest=version.digest,
        device=copy.serving.device,
        threads=copy.threads,
        batch=copy.batching.max_batch,
        batch_window_s=copy.batching.window_s,
        max_tokens=copy.max_tokens,
        memory_bytes=math.ceil(HEADROOM * (metrics.get("peak_memory_bytes", 0.0) + SERVER_BYTES)),
        command=("python3", *words[:at], *words[at + 2 :]),
        environment={name: value.replace(str(copy.folder), PLACE) for name, value in _told(server.environment, copy).items()},
        example=server.example,
        metrics=dict(metrics),
    )


def _told(environment: Mapping[str, str], copy: VerifiedCopy) -> dict[str, str]:
    """The engine's variables, and the number of threads for libraries that read it when they are imported."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(copy.threads))
    return {**threads, "PYTHONSAFEPATH": "1", "DO_NOT_TRACK": "1", **environment}


def start_script(deployment: Deployment, sums: str) -> str:
    """The command that serves the folder in which it lies. It checks every file first, and itself listens here alone by default.

    Exit code 9 for other files, 7 for a Python without the engine. sums: sha256 of the list of files. $PYTHON, $HOST and $PORT say
    otherwise.
    """
    variables = [f"export {name}={_word(value)}" for name, value in sorted(deployment.environment.items())]
    command = " ".join(_word(word) for word in deployment.command[1:])
    python, package = '"${PYTHON:-python3}"', "vllm" if deployment.engine == "vllm" else "featherweight"
    lacking = f'echo {python}" has no {package}, which serves this; set PYTHON to one that has it" >&2; exit 7'
    checked = f"echo '{sums}  {SUMS}' | sha256sum --check --status - && sha256sum --check --quiet {SUMS} >&2"
    return "\n".join(
        [
            "#!/bin/sh",
            f"# {deployment.head}, {deployment.batches}, {deployment.max_tokens} tokens.",
            "set -eu",
            'cd "$(dirname "$0")"',
            f'{{ {checked}; }} || {{ echo "$PWD holds other files than were deployed" >&2; exit 9; }}',
            *variables,
            f"{python} -c {shlex.quote(FIND)} {package} >/dev/null || {{ {lacking}; }}",
            f'exec {python} {command} --host "${{HOST:-127.0.0.1}}" --port "${{PORT:-{PORT}}}"',
            "",
        ]
    )


def _word(text: str) -> str:
    """A word of a shell, the model's folder in it where the script lies."""
    if text == PLACE or text.startswith(f"{PLACE}/"):
        return f'"$PWD"/{shlex.quote(text.removeprefix("./"))}'
    return shlex.quote(text)


def write_folder(deployment: Deployment, folder: Path) -> Deployment:
    """Write all but the model, which lies at `folder/model`: the sums of its files, the script, and what it is, with its sum."""
    files = sorted(path for path in (folder / MODEL).rglob("*") if path.is_file())
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines))
    script = folder / START
    script.write_text(start_script(deployment, file_sha256(folder / SUMS)))
    script.chmod(0o755)
    told = Deployment(**{**asdict(deployment), "start": file_sha256(script)})
    (folder / FACTS).write_text(json.dumps(asdict(told), indent=1))
    return told
