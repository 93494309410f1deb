"""`@stage`: what turns a pure function into a node of a flow.

The function knows files and a spec. Around it, here and nowhere else: the cache key, the Prefect task with its retries, the
MLflow nested run, progress, timing, peak memory, the manifest and the lineage edges.
"""

from __future__ import annotations

import errno
import inspect
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import DivergenceError, FeatherweightError, IntegrityError, ServiceError, StageError, told
from featherweight.masking import masked, masked_tree
from featherweight.progress import Metrics, Progress
from featherweight.recipe.plan import Node
from featherweight.report.loss_curve import loss_page
from featherweight.spec import Spec
from featherweight.store.artifact import ArtifactRef, Manifest, content_digest, describe_files, merkle_digest
from featherweight.store.mlflow_errors import mlflow_explained
from featherweight.store.workspace import Workspace
from featherweight.system.processes import WORKERS_PEAK, highest, resident_bytes
from tasks.cache_key import hardware, libraries_of, library_versions, made_by

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Session:
    """One optimization under way: where its runs and artifacts go, and who hears of its progress."""

    workspace: Workspace
    client: MlflowClient
    experiment_id: str
    run_id: str
    tags: Mapping[str, str]
    listen: Callable[[Node], Progress]


@dataclass(frozen=True)
class Stage:
    """A stage's function and what its cache key must know beside the inputs.

    The function is called as `function(spec, *, out, seed, progress, **inputs)`: `inputs` are folders (Path) by name, `out` is
    an empty folder to fill, `progress` is a featherweight.progress.Progress; it returns a flat mapping of metrics. A function
    that names `scratch` gets a folder that outlives a kill, the same one for the same work and nothing else.
    """

    name: str
    function: Callable[..., Metrics]
    version: str
    libraries: tuple[str, ...]
    hardware: bool
    source: Callable[[Any], str] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Metrics:
        return self.function(*args, **kwargs)

    def key(self, node: Node, digests: Mapping[str, str]) -> str:
        """The cache key of a node whose inputs have these digests (by input name)."""
        return content_digest(
            {
                "stage": self.name,
                "version": self.version,
                "code": made_by(self.function, node),
                "spec": node.spec.model_dump(mode="json"),
                "source": self.source(node.spec) if self.source else None,
                "inputs": dict(digests),
                "seed": node.seed,
                "libraries": library_versions(self.libraries),
                "hardware": hardware() if self.hardware else None,
            }
        )

    def execute(self, node: Node, inputs: Mapping[str, ArtifactRef], session: Session, key: str) -> ArtifactRef:
        """Run the function in a nested MLflow run and publish what it made. Nothing is left behind where it fails."""
        run = session.client.create_run(
            session.experiment_id,
            run_name=node.id,
            tags={
                **session.tags,
                "mlflow.parentRunId": session.run_id,
                "featherweight.node": node.id,
                "featherweight.stage": self.name,
                "featherweight.key": key,
            },
        )
        run_id = run.info.run_id
        try:
            ref = self._make(node, inputs, session, key, run_id)
        except BaseException as error:
            killed = not isinstance(error, Exception)
            session.client.set_tag(run_id, "featherweight.error", told(error))
            session.client.set_terminated(run_id, "KILLED" if killed else "FAILED")
            raise
        session.client.set_terminated(run_id, "FINISHED")
        return ref

    @contextmanager
    def _scratch(self, workspace: Workspace, key: str) -> Iterator[dict[str, Path]]:
        """The folder in which the function keeps what it needs to resume, for a function that asks for one.

        It stays after a kill, Ctrl-C or a full disk. It goes when the work is done, and when the stage itself has failed:
        the same would happen again.
        """
        if "scratch" not in inspect.signature(self.function).parameters:
            yield {}
            return
        folder = workspace.scratch_folder(key)
        try:
            yield {"scratch": folder}
        except StageError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)

    def _make(self, node: Node, inputs: Mapping[str, ArtifactRef], session: Session, key: str, run_id: str) -> ArtifactRef:
        started, clock = _now(), time.perf_counter()
        folders = {name: session.workspace.materialize(ref, check=False) for name, ref in inputs.items()}
        _silence(self.libraries)
        progress = _LoggedProgress(session.listen(node), session.client, run_id)
        spaces = (session.workspace.working_folder(), self._scratch(session.workspace, key))
        with spaces[0] as work, spaces[1] as scratch, _clear_errors(node.id):
            out = work / "artifact"
            out.mkdir()
            with highest(resident_bytes, every_s=0.1) as peak, _evidence(session.client, run_id, out):
                metrics = dict(self.function(node.spec, out=out, seed=node.seed, progress=progress, **folders, **scratch))
            files = describe_files(out)
            seconds = time.perf_counter() - clock
            manifest = Manifest(
                digest=merkle_digest(files),
                files=files,
                stage=self.name,
                node=node.id,
                key=key,
                spec=masked_tree(node.spec.model_dump(mode="json")),
                seed=node.seed,
                parents={name: ref.digest for name, ref in inputs.items()},
                metrics=metrics,
                environment=library_versions((*self.libraries, *libraries_of(node))),
                machine=_machine(),
                started=started,
                finished=_now(),
            )
            manifest.write(out)
            progress.flush()
            _log(session.client, run_id, node, metrics, seconds, peak())
            uri = session.workspace.publish(session.client, run_id, out)
        return ArtifactRef(uri=uri, digest=manifest.digest, run_id=run_id, node=node.id, seconds=seconds, metrics=metrics)


def stage(
    name: str,
    *,
    version: str = "1",
    libraries: tuple[str, ...] = (),
    hardware: bool = False,
    source: Callable[[Any], str] | None = None,
) -> Callable[[Callable[..., Metrics]], Stage]:
    """Declare a stage. Raise `version` whenever the function's result changes for the same input and the code does not show it.

    libraries: distributions whose version shapes the result. hardware: the result depends on this very machine.
    source: identity of what a spec names outside the artifacts (a checkpoint folder, a text file).
    """

    def wrap(function: Callable[..., Metrics]) -> Stage:
        return Stage(name, function, version, libraries, hardware, source)

    return wrap


def run_node(
    stage: Stage, node: Node, inputs: Mapping[str, dict[str, Any]], session: Session
) -> tuple[dict[str, Any] | None, bool, Exception | None]:
    """Run a node as a Prefect task, or take its verified result from the cache: (reference, cached, error)."""
    from prefect import Task

    refs = {name: ArtifactRef.model_validate(ref) for name, ref in inputs.items()}
    try:
        key = stage.key(node, {name: ref.digest for name, ref in refs.items()})
    except FeatherweightError as error:
        return None, False, error
    ran: list[bool] = []

    def run_stage(parents: dict[str, dict[str, Any]]) -> dict[str, Any]:
        ran.append(True)
        with mlflow_explained(session.workspace.tracking_uri):
            return stage.execute(node, refs, session, key).model_dump()

    task = Task(
        run_stage,
        name=f"{stage.name}: {node.label}",
        task_run_name=f"{node.id} [{stage.name} {method(node.spec)}]".replace(" ]", "]").replace("{", "(").replace("}", ")"),
        tags=[stage.name],
        cache_key_fn=lambda *_: _slot(key, session.workspace),
        persist_result=True,
        result_serializer="json",
        refresh_cache=not is_cached(key, session.workspace),
        retries=1,
        retry_delay_seconds=2,
        retry_condition_fn=_is_transient,
    )
    state: Any = task(dict(inputs), return_state=True)
    if state.is_completed():
        return state.result(), not ran, None
    raised = state.result(raise_on_failure=False)
    return None, False, raised if isinstance(raised, Exception) else StageError(f"{node.id}: {state.message}")


def _slot(key: str, workspace: Workspace) -> str:
    """Where Prefect keeps the reference: results of one tracking store mean nothing to another."""
    return content_digest([key, workspace.tracking_uri])


def cached_ref(key: str, workspace: Workspace) -> ArtifactRef | None:
    """The reference that Prefect's result store holds under a key."""
    from prefect.results import ResultStore, get_default_result_storage

    try:
        storage: Any = get_default_result_storage
        store = ResultStore(result_storage=storage(_sync=True))
        return ArtifactRef.model_validate(store.read(_slot(key, workspace)).result)
    except (ValueError, KeyError, OSError):
        return None


def is_cached(key: str, workspace: Workspace) -> bool:
    """Whether a result is held under the key and its artifact is there, undamaged; a damaged one is rebuilt, not trusted."""
    ref = cached_ref(key, workspace)
    if ref is None:
        return False
    try:
        workspace.materialize(ref)
    except (IntegrityError, ServiceError):
        return False
    return True


def method(spec: Spec) -> str:
    """The words of a spec that name its method, such as 'gptq int8'."""
    names = ("engine", "method", "criterion", "precision", "compute_type", "grid", "split")
    return " ".join(str(getattr(spec, name)) for name in names if hasattr(spec, name) and name not in spec.unread)


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


def _is_transient(task: Any, run: Any, state: Any) -> bool:
    """Only a service that may come back is worth a second try."""
    return isinstance(state.result(raise_on_failure=False), ServiceError)


def _log(client: MlflowClient, run_id: str, node: Node, metrics: Metrics, seconds: float, peak: int) -> None:
    """Final metrics and the spec, in one batch each. peak: resident bytes of this process, its workers not among them."""
    from mlflow.entities import Metric, Param

    values = {**metrics, "stage_seconds": seconds, "stage_peak_memory_bytes": peak + metrics.get(WORKERS_PEAK, 0)}
    stamp = int(time.time() * 1000)
    params = [Param(name, masked(value)[:500]) for name, value in node.spec.model_dump(mode="json").items()]
    client.log_batch(run_id, [Metric(name, float(value), stamp, 0) for name, value in values.items()], params)


class _LoggedProgress(Progress):
    """Hands progress on, and writes live values to the MLflow run about once a second."""

    def __init__(self, listener: Progress, client: MlflowClient, run_id: str) -> None:
        self._listener, self._client, self._run_id = listener, client, run_id
        self._pending: list[tuple[str, float, int, int]] = []
        self._flushed = time.monotonic()

    def step(self, done: int, total: int, **values: float) -> None:
        self._listener.step(done, total, **values)
        stamp = int(time.time() * 1000)
        self._pending += [(f"live_{name}", float(value), stamp, done) for name, value in values.items()]
        if time.monotonic() - self._flushed > 1:
            self.flush()

    def note(self, text: str) -> None:
        self._listener.note(text)

    def flush(self) -> None:
        """Write what is pending."""
        from mlflow.entities import Metric

        for start in range(0, len(self._pending), 500):
            chunk = self._pending[start : start + 500]
            self._client.log_batch(self._run_id, [Metric(*item) for item in chunk])
        self._pending.clear()
        self._flushed = time.monotonic()


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
