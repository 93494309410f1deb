"""A stage in several processes that train one model together: torch's launcher starts them, accelerate joins them.

`run_in_processes` is the side of the stage's own process; `python -m tasks.training_processes REQUEST` is each of the others.
They speak in JSON lines on standard output: the first process of its progress and its metrics, each of its error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any, TextIO

from featherweight import errors
from featherweight.errors import FeatherweightError, StageError, one_line
from featherweight.progress import Progress
from featherweight.spec import Spec
from featherweight.system.processes import WORKERS_PEAK, end_group, end_with_parent, free_port, highest, tree_peak_bytes
from featherweight.training.processes import Team, cores, leads, training_threads
from tasks.stages import stage_named

SPAWN_LOG_BYTES = 4000


def run_in_processes(
    stage: str, spec: Spec, folders: Mapping[str, Path | None], seed: int, processes: int, progress: Progress
) -> dict[str, float]:
    """Call a stage's function in `processes` processes at once, and return the metrics of the first.

    folders: the function's inputs, its `out` and its `scratch`, by name. Each process gets its share of the cores. A metric more
    is `workers_peak_memory_bytes`: the peak resident sets of all processes and their launcher together, read every second (pages
    that they share count in each). Raises what the first process to fail raised, StageError where there are not as many cores
    (or GPUs) as processes.
    """
    _check_devices(stage, processes)
    paths = {name: str(path.absolute()) for name, path in folders.items() if path is not None}
    request = {
        "stage": stage,
        "kind": f"{type(spec).__module__}:{type(spec).__name__}",
        "spec": spec.model_dump(mode="json"),
        "folders": paths,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request))
        launcher = subprocess.Popen(
            _command(file, processes),
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(processes),
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )
        assert launcher.stdout
        try:
            with highest(lambda: tree_peak_bytes(launcher.pid), every_s=1) as peak:
                metrics = _listen(launcher.stdout, progress)
            if launcher.wait() or metrics is None:
                raise StageError(f"{stage}: its {processes} processes ended with status {launcher.returncode}; {_tail(log)}")
            return metrics | {WORKERS_PEAK: float(peak())}
        finally:
            end_group(launcher)
            launcher.stdout.close()


def _check_devices(stage: str, processes: int) -> None:
    import torch

    gpus = torch.cuda.device_count()
    there, kind = (gpus, "GPUs") if gpus else (cores(), "cores")
    if processes > there:
        raise StageError(f"{stage}.processes {processes} is more than the {there} {kind} in reach; lower it")


def _command(request: Path, processes: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(processes)]
    return [
        *launcher,
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port()),
        "-m",
        "tasks.training_processes",
        str(request),
    ]


def _environment(processes: int) -> dict[str, str]:
    """The cores divided among the processes, whatever library uses them."""
    threads = str(max(1, min(cores() // processes, training_threads())))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    return os.environ | dict.fromkeys(names, threads) | {"TORCHELASTIC_ERROR_FILE": os.devnull}


def _listen(lines: IO[bytes], progress: Progress) -> dict[str, float] | None:
    """Hand progress on to the end, and return the metrics; None where they never came. Raises what a process says it raised.

    Of several errors the first that is not about the connection to another process: that one only tells of its end.
    """
    metrics, failures = None, []
    for line in lines:
        if not line.startswith(b"{"):
            continue  # a library's own words
        ((kind, value),) = json.loads(line).items()
        if kind == "step":
            progress.step(value["done"], value["total"], **value["values"])
        elif kind == "note":
            progress.note(value)
        elif kind == "metrics":
            metrics = value
        elif kind == "error":
            failures.append(value)
    if failures:
        raise _error(**min(failures, key=lambda failure: "Connection" in failure["text"]))
    return metrics


def _error(kind: str, text: str, losses: list[float]) -> BaseException:
    """The error that another process raised, as far as it is one of ours."""
    if kind == "DivergenceError":
        return errors.DivergenceError(text, tuple(losses))
    known = getattr(errors, kind, {"MemoryError": MemoryError}.get(kind))
    return known(text) if known else RuntimeError(f"{kind}: {text}")


def _tail(log: IO[bytes]) -> str:
    """The end of what the processes wrote to standard error, in one line."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - SPAWN_LOG_BYTES))
    lines = [" ".join(line.split()) for line in log.read().decode(errors="replace").splitlines()]
    return "its last words: " + " | ".join([line for line in lines if line][-5:])


class _Told(Progress):
    """Progress as JSON lines; only the first process speaks."""

    def __init__(self, channel: TextIO) -> None:
        self._channel = channel

    def step(self, done: int, total: int, **values: float) -> None:
        if leads():
            _say(self._channel, step={"done": done, "total": total, "values": values})

    def note(self, text: str) -> None:
        if leads():
            _say(self._channel, note=text)


def _say(channel: TextIO, **message: Any) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def main() -> int:
    """Run the stage of a request as one of several processes."""
    if end := end_with_parent():
        end()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        metrics = _run(request, _Told(channel))
    except Exception as error:
        known = isinstance(error, FeatherweightError)
        text = str(error) if known else one_line(error)
        _say(channel, error={"kind": type(error).__name__, "text": text, "losses": list(getattr(error, "losses", ()))})
        return 1
    if leads():
        _say(channel, metrics=metrics)
    return 0


def _run(request: dict[str, Any], progress: Progress) -> dict[str, float]:

    Team()  # chooses this process's device before anything is put on one
    stage = stage_named(request["stage"])
    module, _, kind = request["kind"].partition(":")
    spec = getattr(import_module(module), kind)(**request["spec"])
    folders = {name: Path(path) for name, path in request["folders"].items()}
    return dict(stage.function(spec, **folders, seed=request["seed"], progress=progress))


if __name__ == "__main__":
    sys.exit(main())
