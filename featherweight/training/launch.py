"""A function in several processes that train one model together: torch's launcher starts them, accelerate joins them.

`run_in_processes` is the side of the caller's own process; `python -m featherweight.training.launch REQUEST` is each of the others.
The first of them tells of its progress and its metrics, each of its error.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from featherweight.errors import StageError
from featherweight.progress import Progress
from featherweight.spec import Spec
from featherweight.system import device
from featherweight.system.child_process import Channel, ChildProcess, Message, error_of, failure
from featherweight.system.environment import without_secrets
from featherweight.system.processes import WORKERS_PEAK, end_with_parent, held_port, highest, peak_bytes, tree_peak_bytes
from featherweight.training.data_parallel import DataParallelGroup, leads
from featherweight.training.threads import cores, training_threads


def run_in_processes(
    function: str, spec: Spec, folders: Mapping[str, Path | None], seed: int, processes: int, progress: Progress
) -> dict[str, float]:
    """Call `function(spec, **folders, seed=, progress=)` in `processes` processes at once, and return the metrics of the first.

    function: 'module:attribute'. folders: a stage's inputs, its `out` and its `scratch`, by name; those that are None are left out.
    One is started as it is, without torch's launcher: a native library that crashes takes that process along, and not its caller.
    Each process gets its share of the cores. A metric more is `workers_peak_memory_bytes`: the peak resident sets of all
    processes and their launcher together, read five times a second, or what the processes tell of themselves as they end where
    that is more (pages that they share count in each). Raises what the first process to fail raised, StageError where there are
    not as many cores (or GPUs) as processes.
    """
    _check_devices(function, processes)
    request = {
        "function": function,
        "kind": f"{type(spec).__module__}:{type(spec).__qualname__}",
        "spec": spec.model_dump(mode="json"),
        "folders": {name: str(path.absolute()) for name, path in folders.items() if path is not None},
        "seed": seed,
    }
    with _launched(request, processes) as launcher:
        with highest(lambda: tree_peak_bytes(launcher.process.pid), every_s=0.2) as peak:
            metrics, told = _listen(launcher, progress)
        if launcher.process.wait() or metrics is None:
            who = "its process" if processes == 1 else f"its {processes} processes"
            raise StageError(f"{_named(function)}: {who} ended with {launcher.ending()}; {launcher.tail()}")
        return metrics | {WORKERS_PEAK: float(max(peak(), told))}


def _named(function: str) -> str:
    return function.rpartition(":")[2]


def _check_devices(function: str, processes: int) -> None:
    gpus = device.count()
    there, kind = (gpus, "GPUs") if gpus else (cores(), "cores")
    if processes > there:
        raise StageError(f"{_named(function)}.processes {processes} is more than the {there} {kind} in reach; lower it")


@contextmanager
def _launched(request: Mapping[str, Any], processes: int) -> Iterator[ChildProcess]:
    """The launcher with its processes at work; none of them is left afterwards."""
    with tempfile.TemporaryDirectory() as folder, held_port() as port:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request))
        launcher = ChildProcess(_command(file, processes, port), _environment(processes), dies_with_parent=True)
        try:
            yield launcher
        finally:
            launcher.kill()
            launcher.close()


def _command(request: Path, processes: int, port: int) -> list[str]:
    several = ["--nnodes", "1", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    alone = ["-m", "featherweight.training.launch", str(request)]
    return [sys.executable, *alone] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", *several, *alone]


def _environment(processes: int) -> dict[str, str]:
    """The cores divided among the processes and the stages beside them, whatever library uses them."""
    here = device.place_in_use()
    processes *= here.of if here and here.gpu is None else 1
    threads = str(max(1, min(cores() // processes, training_threads())))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    return without_secrets() | dict.fromkeys(names, threads) | device.told() | {"TORCHELASTIC_ERROR_FILE": os.devnull}


def _listen(launcher: ChildProcess, progress: Progress) -> tuple[dict[str, float] | None, int]:
    """Hand progress on to the end; the metrics, None where they never came, and the sum of the peaks that processes tell.

    Raises what a process says it raised: of several errors the first that is not about the connection to another process, for
    that one only tells of its end.
    """
    metrics, failures, peaks = None, [], 0
    while message := launcher.receive():
        ((kind, value),) = message.items()
        if kind == "step":
            progress.step(value["done"], value["total"], **value["values"])
        elif kind == "note":
            progress.note(value)
        elif kind == "metrics":
            metrics = value
        elif kind == "peak":
            peaks += value
        elif kind == "error":
            failures.append(value)
    if failures:
        raise error_of(min(failures, key=lambda told: "Connection" in told["text"]))
    return metrics, peaks


class _SentProgress(Progress):
    """Progress as messages; only the first process speaks."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def step(self, done: int, total: int, **values: float) -> None:
        if leads():
            self._channel.send({"step": {"done": done, "total": total, "values": values}})

    def note(self, text: str) -> None:
        if leads():
            self._channel.send({"note": text})


def main(request: Path) -> int:
    """Run the function of a request as one of several processes."""
    if end := end_with_parent():
        end()
    channel = Channel.claim_stdout(turn=request)
    try:
        metrics = _run(json.loads(request.read_text()), _SentProgress(channel))
    except Exception as error:
        channel.send({"error": failure(error)})
        return 1
    channel.send({"peak": peak_bytes(os.getpid())})
    if leads():
        channel.send({"metrics": metrics})
    return 0


def _run(request: Message, progress: Progress) -> dict[str, float]:
    group = DataParallelGroup()  # chooses this process's device before anything is put on one
    folders = {name: Path(path) for name, path in request["folders"].items()}
    spec = _load(request["kind"])(**request["spec"])
    peak = device.GpuPeak()
    metrics = dict(_load(request["function"])(spec, **folders, seed=request["seed"], progress=progress)) | peak.metrics()
    group.end()
    return metrics


def _load(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
