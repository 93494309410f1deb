"""`@stage` in a real flow: caching by content, verification, failure, progress and what MLflow gets to see."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from featherweight.errors import DivergenceError, ServiceError, StageError
from featherweight.progress import Metrics, Progress
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.plan import Node
from featherweight.spec import Spec
from featherweight.store.artifact import ArtifactRef, Manifest
from featherweight.store.workspace import local_path
from featherweight.system.processes import WORKERS_PEAK
from featherweight.training.spec import FinetuneSpec
from tasks.stage import Session, Stage, method, run_node, stage
from tests.support.serving_models import serving_spec
from tests.support.stores import new_workspace

CALLS: list[str] = []


@stage("copy", libraries=("pydantic",))
def copy(spec: FinetuneSpec, *, source: Path | None = None, out: Path, seed: int, progress: Progress) -> Metrics:
    CALLS.append("copy")
    text = (source / "x.txt").read_text() if source else str(spec.steps)
    (out / "x.txt").write_text(text + "!")
    progress.step(1, 2, loss=3.0)
    progress.step(2, 2, loss=2.0)
    return {"length": len(text)}


@stage("break")
def broken(spec: FinetuneSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
    CALLS.append("break")
    (out / "half").write_text("half")
    raise StageError("it broke\non two lines")


@stage("full")
def full(spec: FinetuneSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
    raise OSError(28, "No space left on device")


@stage("resume")
def resumable(spec: FinetuneSpec, *, out: Path, scratch: Path, seed: int, progress: Progress) -> Metrics:
    """Counts its calls in the scratch folder: interrupted at the first, failed for good at the second, done at the third."""
    count = len(list(scratch.iterdir()))
    CALLS.append(f"resume {count}")
    (scratch / str(count)).touch()
    if count < 2 and spec.steps == 1:
        raise [ServiceError("the disk is full"), StageError("diverged")][count]
    (out / "x.txt").write_text("x")
    return {}


@stage("diverge")
def diverging(spec: FinetuneSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
    progress.step(1, 2, loss=3.0)
    raise DivergenceError("training diverged at step 2", (3.0, float("nan")))


@stage("team")
def team(spec: FinetuneSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
    (out / "x.txt").write_text("x")
    return {WORKERS_PEAK: 1e12}


@pytest.fixture
def session(tmp_path: Path, harness: None) -> Session:
    workspace = new_workspace(tmp_path / "workspace")
    client = workspace.client()
    experiment = workspace.experiment(client, "test")
    parent = client.create_run(experiment).info.run_id
    CALLS.clear()
    return Session(workspace, client, experiment, parent, {}, lambda node: Progress())


def run(session: Session, *steps: tuple[Stage, Node]) -> list[tuple]:
    """Run nodes in one flow, each fed by the one before."""
    from prefect import Flow

    def body() -> list[tuple]:
        results, last = [], None
        for each, node in steps:
            inputs = {"source": last} if last and "source" in node.inputs else {}
            result = run_node(each, node, inputs, session)
            results.append(result)
            last = result[0]
        return results

    return Flow(body, name="test")()


def node(id: str = "a", steps: int = 1, **inputs: str) -> Node:
    return Node(id, "copy", "label", FinetuneSpec(steps=steps), inputs)


def test_a_second_run_recomputes_nothing_and_a_changed_spec_does(session: Session) -> None:
    chain = [(copy, node()), (copy, node("b", source="a"))]
    first, second = run(session, *chain)
    assert not first[1]
    assert not second[1]
    again = run(session, *chain)
    assert [cached for _, cached, _ in again] == [True, True]
    assert CALLS == ["copy", "copy"]
    assert [ref for ref, _, _ in again] == [first[0], second[0]]
    run(session, (copy, node(steps=2)))
    assert len(CALLS) == 3


@pytest.mark.parametrize(
    ("spec", "words"),
    [(PruneSpec.of(), "structured param_first"), (PruneSpec.of(method="depth"), "depth"),
     (PruneSpec.of(method="attention", kv_heads=1), "attention"), (PruneSpec.of(method="sparse"), "sparse wanda"),
     (PruneSpec.of(method="width", criterion="activation"), "width activation"), (QuantizeSpec.of(method="gptq"), "gptq int8"),
     (serving_spec("torch-dynamic"), "torch-dynamic"), (serving_spec("torch"), "torch float32"), (FinetuneSpec(), "")],
)  # fmt: skip
def test_a_node_is_called_by_what_its_method_reads(spec: Spec, words: str) -> None:
    assert method(spec) == words


def test_the_memory_of_its_workers_counts(session: Session) -> None:
    ((reference, _, _),) = run(session, (team, node()))
    metrics = session.client.get_run(ArtifactRef.model_validate(reference).run_id).data.metrics
    assert 1e12 + 1e6 < metrics["stage_peak_memory_bytes"] < 1.1e12


def test_what_it_leaves_in_mlflow(session: Session) -> None:
    ((reference, _, _),) = run(session, (copy, node()))
    ref = ArtifactRef.model_validate(reference)
    logged = session.client.get_run(ref.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.tags["mlflow.parentRunId"] == session.run_id
    assert logged.data.metrics["length"] == 1
    assert logged.data.metrics["stage_peak_memory_bytes"] > 1e6
    assert [m.value for m in session.client.get_metric_history(ref.run_id, "live_loss")] == [3.0, 2.0]
    folder = session.workspace.materialize(ref)
    assert (folder / "x.txt").read_text() == "1!"
    manifest = Manifest.read(folder)
    assert manifest.environment["pydantic"]
    assert list((session.workspace.root / "work").iterdir()) == []


def test_a_damaged_artifact_is_rebuilt(session: Session) -> None:
    ((reference, _, _),) = run(session, (copy, node()))
    folder = local_path(reference["uri"])
    assert folder is not None
    (folder / "x.txt").write_text("tampered")
    ((rebuilt, cached, _),) = run(session, (copy, node()))
    assert not cached
    assert rebuilt["digest"] == reference["digest"]
    assert rebuilt["uri"] != reference["uri"]
    ((_, cached, _),) = run(session, (copy, node()))
    assert cached


def test_a_failure_is_one_line_never_cached_and_leaves_nothing(session: Session) -> None:
    for _ in range(2):
        ((reference, _, error),) = run(session, (broken, node()))
        assert reference is None
        assert isinstance(error, StageError)
    assert CALLS == ["break", "break"]
    assert list((session.workspace.root / "work").iterdir()) == []
    failed = session.client.search_runs([session.experiment_id], "attributes.status = 'FAILED'")
    assert len(failed) == 2
    assert failed[0].data.tags["featherweight.error"] == "it broke on two lines"


def test_a_full_disk_is_told_as_such(session: Session) -> None:
    ((_, _, error),) = run(session, (full, node()))
    assert isinstance(error, ServiceError)
    assert "no space left" in str(error)


def test_the_key_sees_inputs_seed_spec_version_and_library() -> None:
    import dataclasses

    plain = copy.key(node(), {"source": "d"})
    assert plain == copy.key(node("elsewhere"), {"source": "d"})
    assert plain != copy.key(node(), {"source": "e"})
    assert plain != copy.key(dataclasses.replace(node(), seed=1), {"source": "d"})
    assert plain != copy.key(node(steps=3), {"source": "d"})
    assert plain != dataclasses.replace(copy, version="2").key(node(), {"source": "d"})
    assert plain != dataclasses.replace(copy, libraries=("typer",)).key(node(), {"source": "d"})


def test_a_scratch_folder_outlives_an_interruption_but_not_a_failure_nor_the_end(session: Session) -> None:
    folder = session.workspace.root / "resume"
    node_, key = node(), resumable.key(node(), {})
    for error in (ServiceError, StageError):
        with pytest.raises(error):
            resumable.execute(node_, {}, session, key)
        assert len(list(folder.iterdir())) == (error is ServiceError)
    resumable.execute(node(steps=2), {}, session, resumable.key(node(steps=2), {}))
    assert CALLS == ["resume 0", "resume 1", "resume 0"]
    assert not list(folder.iterdir())


def test_a_scratch_folder_is_that_of_its_key_and_goes_when_forgotten(session: Session) -> None:
    one, two = (session.workspace.scratch_folder(key) for key in ("a" * 64, "b" * 64))
    assert one != two
    assert session.workspace.scratch_folder("a" * 64) == one
    os.utime(one, (0, 0))
    session.workspace.scratch_folder("b" * 64)
    assert not one.exists()
    assert two.exists()


def test_a_diverging_run_leaves_its_loss_curve(session: Session) -> None:
    ((_, _, error),) = run(session, (diverging, node()))
    assert isinstance(error, DivergenceError)
    (failed,) = session.client.search_runs([session.experiment_id], "attributes.status = 'FAILED'")
    page = session.client.download_artifacts(failed.info.run_id, "failure/loss.html")
    assert "step 2: nan" in Path(page).read_text()


def test_losses_reach_mlflow_while_the_stage_still_runs(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    clock = itertools.count(start=100.0, step=2.0)  # two seconds pass between any two looks at it
    monkeypatch.setattr("tasks.stage.time.monotonic", lambda: next(clock))

    @stage("live")
    def live(spec: FinetuneSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
        for step in range(3):
            progress.step(step + 1, 3, loss=float(step))
            (own,) = session.client.search_runs([session.experiment_id], "attributes.run_name = 'live'")
            seen.append([metric.value for metric in session.client.get_metric_history(own.info.run_id, "live_loss")])
        (out / "x.txt").write_text("x")
        return {}

    live.execute(node("live"), {}, session, "key")
    assert seen == [[0.0], [0.0, 1.0], [0.0, 1.0, 2.0]]
