"""The MLflow run of one stage run: what it makes becomes an artifact, what it raises becomes evidence."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import DivergenceError, FeatherweightError, ServiceError, StageError, told
from featherweight.masking import masked, masked_tree
from featherweight.progress import Metrics, Progress
from featherweight.recipe.nodes import Node
from featherweight.report.loss_curve import loss_page
from featherweight.runtimes.kept_worker import kept_cpu_s
from featherweight.store.artifact import ArtifactRef, Manifest, describe_files, merkle_digest
from featherweight.system.device import CUDA, GpuPeak, place_in_use, using
from featherweight.system.processes import WORKERS_PEAK, highest, resident_bytes
from featherweight.training.launch import run_in_processes
from tasks.cache_key import hardware, libraries_of, library_versions, toolchain_versions
from tasks.live_progress import LiveProgress
from tasks.openlineage import told_to_openlineage
from tasks.parent_run import ParentRun, ambient
from tasks.stage import Stage
from tasks.stopping import stopped

if TYPE_CHECKING:
    from mlflow import MlflowClient

LARGE_BYTES = 1 << 28
"""Of a checkpoint with which a stage computes for minutes: a process of its own, which takes seconds, costs little then. Whoever
writes into its files, which are mapped and only read, ends with a fault."""


def execute(stage: Stage, node: Node, inputs: Mapping[str, ArtifactRef], parent: ParentRun, key: str) -> ArtifactRef:
    """Run a stage's function in a nested MLflow run and publish what it made. Nothing is left behind where it fails."""
    client = parent.client
    tags = {
        **parent.tags,
        "mlflow.parentRunId": parent.run_id,
        "featherweight.node": node.id,
        "featherweight.stage": stage.name,
        "featherweight.key": key,
    }
    run_id = client.create_run(parent.experiment_id, run_name=node.id, tags=tags).info.run_id
    try:
        with ambient(parent.workspace.tracking_uri), told_to_openlineage(node, inputs, parent, run_id) as made:
            ref = _make(stage, node, inputs, parent, key, run_id)
            made(ref.digest)
    except BaseException as error:
        killed = stopped() or not isinstance(error, Exception)
        client.set_tag(run_id, "featherweight.error", told(error))
        client.set_terminated(run_id, "KILLED" if killed else "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    return ref


def _make(stage: Stage, node: Node, inputs: Mapping[str, ArtifactRef], parent: ParentRun, key: str, run_id: str) -> ArtifactRef:
    started, clock, cpu, client, workspace = _now(), time.perf_counter(), _cpu_seconds(), parent.client, parent.workspace
    folders = {name: workspace.materialize(ref, check=False) for name, ref in inputs.items()}
    _silence(stage.libraries)
    progress = LiveProgress(parent.progress.progress(node.id), client, run_id)
    given = _given(stage, folders, inputs, parent)
    with workspace.working_folder() as work, _scratch(stage, parent, key) as scratch, _clear_errors(node.id):
        out = work / "artifact"
        out.mkdir()
        with using(node.device), highest(resident_bytes, every_s=0.1) as peak, _evidence(client, run_id, out):
            gpu = GpuPeak()
            made = dict(_call(stage, node, progress, {"out": out, **given, **scratch}))
        metrics = gpu.metrics() | made
        seconds = time.perf_counter() - clock
        manifest = _manifest(stage, node, inputs, key, out, metrics, started)
        manifest.write(out)
        progress.flush()
        took = {"stage_seconds": seconds, "stage_cpu_seconds": _cpu_seconds() - cpu}
        _log(client, run_id, node, {**metrics, **took}, peak())
        uri = workspace.publish(client, run_id, out)
    return ArtifactRef(uri=uri, digest=manifest.digest, run_id=run_id, node=node.id, seconds=seconds, metrics=metrics)


def _call(stage: Stage, node: Node, progress: Progress, given: dict[str, Any]) -> Metrics:
    """The stage's function, here or in a process whose crash is an error of this node alone, and which others run beside."""
    beside = place_in_use() is not None and not node.engines
    if beside or (stage.native and node.device == CUDA) or _is_large(given.get("checkpoint")):
        reference = f"{stage.function.__module__}:{stage.function.__name__}"
        return run_in_processes(reference, node.spec, given, node.seed, 1, progress)
    return stage.function(node.spec, seed=node.seed, progress=progress, **given)


def _is_large(checkpoint: Any) -> bool:
    """Whether a stage is given a checkpoint whose size makes the start of a process a trifle."""
    return isinstance(checkpoint, Path) and sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) >= LARGE_BYTES


def _given(stage: Stage, folders: dict[str, Path], inputs: Mapping[str, ArtifactRef], parent: ParentRun) -> dict[str, Any]:
    """What the function gets beside spec, seed, out and progress."""
    outside = {"parent": parent, "artifacts": inputs}
    named: Mapping[str, Any] = {"inputs": folders} if stage.gathers else folders
    return {**named, **{name: value for name, value in outside.items() if stage.takes(name)}}


def _manifest(
    stage: Stage, node: Node, inputs: Mapping[str, ArtifactRef], key: str, out: Path, metrics: dict[str, float], started: str
) -> Manifest:
    """What the folder holds and where it comes from."""
    files = describe_files(out)
    return Manifest(
        digest=merkle_digest(files),
        files=files,
        stage=stage.name,
        node=node.id,
        key=key,
        spec=masked_tree(node.spec.model_dump(mode="json")),
        seed=node.seed,
        parents={name: ref.digest for name, ref in inputs.items()},
        metrics=metrics,
        environment=library_versions((*stage.libraries, *libraries_of(node))) | toolchain_versions(node),
        machine=_machine() | ({"device": node.device} if node.device else {}),
        started=started,
        finished=_now(),
    )


@contextmanager
def _scratch(stage: Stage, parent: ParentRun, key: str) -> Iterator[dict[str, Path]]:
    """The folder in which a function keeps what it needs to resume, for a function that asks for one.

    It stays after a kill, Ctrl-C or a full disk. It goes when the work is done, and when the stage itself has failed:
    the same would happen again.
    """
    if not stage.takes("scratch"):
        yield {}
        return
    folder = parent.workspace.scratch_folder(key)
    try:
        yield {"scratch": folder}
    except StageError:
        if not stopped():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _silence(libraries: tuple[str, ...]) -> None:
    """Progress is told by us; the libraries' bars and notes on what this machine lacks would tear the view.

    They set their loggers' levels when imported, so that is done first.
    """
    if "transformers" in libraries or "torch" in libraries:
        import torch  # noqa: F401
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    for name in ("torch", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _cpu_seconds() -> float:
    """Processor time of this process and of those that it started, which other processes do not lengthen.

    Of one that still runs it is known where it is the worker that is kept.
    """
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system + kept_cpu_s()


def _log(client: MlflowClient, run_id: str, node: Node, metrics: Metrics, peak: int) -> None:
    """Final metrics and the spec, in one batch each. peak: resident bytes of this process, its workers not among them."""
    from mlflow.entities import Metric, Param

    values = {**metrics, "stage_peak_memory_bytes": peak + metrics.get(WORKERS_PEAK, 0)}
    stamp = int(time.time() * 1000)
    params = [Param(name, masked(value)[:500]) for name, value in node.spec.model_dump(mode="json").items()]
    client.log_batch(run_id, [Metric(name, float(value), stamp, 0) for name, value in values.items()], params)


@contextmanager
def _clear_errors(node: str) -> Iterator[None]:
    """Turn what a full disk or exhausted memory raises into one clear line."""
    try:
        yield
    except FeatherweightError:
        raise
    except MemoryError as error:
        raise StageError(f"{node}: out of memory; lower the batch or the sequence length") from error
    except Exception as error:
        if not _is_full(error):
            raise
        raise ServiceError(f"{node}: no space left on the disk; free some and run the same command again") from error


def _is_full(error: Exception) -> bool:
    """Whether the disk is full; safetensors and SQLite tell it in their own words only."""
    told = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return told or any(words in str(error) for words in ("os error 28", "No space left", "database or disk is full"))


@contextmanager
def _evidence(client: MlflowClient, run_id: str, out: Path) -> Iterator[None]:
    """Keep the pages that a failing stage wrote about its failure: they go to its MLflow run, and so does a diverging loss."""
    try:
        yield
    except FeatherweightError as error:
        if isinstance(error, DivergenceError):
            (out / "loss.html").write_text(loss_page(error.losses, str(error)), encoding="utf-8")
        for page in out.glob("*.html"):
            client.log_artifact(run_id, str(page), "failure")
        raise


@cache
def _machine() -> dict[str, Any]:
    import platform

    return {"platform": platform.platform(), "python": platform.python_version(), "hardware": hardware()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
