"""`@stage` in a real flow: caching by content, verification, failure, progress and what MLflow gets to see."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import DivergenceError, RecipeError, ServiceError, StageError, Unreachable
from featherweight.progress import Metrics, Progress
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.plan import Node
from featherweight.spec import Spec
from featherweight.store.artifact import ArtifactRef, Manifest
from featherweight.store.workspace import local_path
from featherweight.system import device
from featherweight.system.processes import WORKERS_PEAK
from featherweight.system.progress_channel import ProgressChannel
from featherweight.text.spec import DataSpec, TextSpec
from featherweight.training.spec import FinetuneSpec
from tasks import nested_run
from tasks import run_node as run_node_module
from tasks.nested_run import execute
from tasks.outcome import Outcome
from tasks.parent_run import ParentRun
from tasks.run_node import method, run_node, run_stage
from tasks.stage import Stage, stage
from tasks.stages import stage_named
from tasks.stopping import heeding
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


@stage("away")
def away(spec: FinetuneSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
    """A server that answers again at the fourth call; a disk that stays full, for a spec of two steps."""
    CALLS.append("away")
    if spec.steps == 2:
        raise ServiceError("no space left")
    if len(CALLS) < 4:
        raise Unreachable("the server does not answer")
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


@stage("act")
def acting(
    spec: FinetuneSpec,
    *,
    inputs: dict[str, Path],
    artifacts: dict[str, ArtifactRef],
    parent: ParentRun,
    out: Path,
    seed: int,
    progress: Progress,
) -> Metrics:
    CALLS.append("act")
    told = {name: (artifacts[name].node, (folder / "x.txt").read_text(), parent.run_id) for name, folder in inputs.items()}
    (out / "told.json").write_text(json.dumps(told))
    return {}


@pytest.fixture
def parent(tmp_path: Path, harness: Path) -> ParentRun:
    workspace = new_workspace(tmp_path / "workspace")
    client = workspace.client()
    experiment = workspace.experiment(client, "test")
    CALLS.clear()
    return ParentRun(workspace, experiment, client.create_run(experiment).info.run_id)


def run(parent: ParentRun, *steps: tuple[Stage, Node]) -> list[Outcome]:
    """Run nodes in one flow, each fed by the one before."""
    from prefect import Flow

    def body() -> list[Outcome]:
        outcomes: list[Outcome] = []
        for each, node in steps:
            inputs = {name: outcomes[-1] for name in ("source", "checkpoint") if outcomes and name in node.inputs}
            outcomes.append(run_node(each, node, inputs, parent))
        return outcomes

    return Flow(body, name="test")()


def node(id: str = "a", steps: int = 1, **inputs: str) -> Node:
    return Node(id, "copy", "label", FinetuneSpec(steps=steps), inputs)


def test_a_second_run_recomputes_nothing_and_a_changed_spec_does(parent: ParentRun) -> None:
    chain = [(copy, node()), (copy, node("b", source="a"))]
    first, second = run(parent, *chain)
    assert [first.status, second.status] == ["done", "done"]
    again = run(parent, *chain)
    assert [outcome.status for outcome in again] == ["cached", "cached"]
    assert CALLS == ["copy", "copy"]
    assert [outcome.ref for outcome in again] == [first.ref, second.ref]
    run(parent, (copy, node(steps=2)))
    assert len(CALLS) == 3


def test_the_server_is_asked_for_room_only_for_what_runs(parent: ParentRun) -> None:
    """It is, once for each tag of a task."""

    def tags(each: Stage) -> set[str]:
        key = each.key(node(), {})
        return set(run_node_module._task(each, node(), key, parent.workspace, run_stage).tags)

    assert (tags(copy), tags(acting)) == ({"copy"}, {"act"})
    run(parent, (copy, node()))
    assert (tags(copy), tags(acting)) == (set(), {"act"})


@pytest.mark.parametrize(
    ("spec", "words"),
    [(PruneSpec.of(), "structured param_first"), (PruneSpec.of(method="depth"), "depth"),
     (PruneSpec.of(method="attention", kv_heads=1), "attention"), (PruneSpec.of(method="sparse"), "sparse wanda"),
     (PruneSpec.of(method="width", criterion="activation"), "width activation"), (QuantizeSpec.of(method="gptq"), "gptq int8"),
     (serving_spec("torch-dynamic"), "torch-dynamic"), (serving_spec("torch"), "torch float32"), (FinetuneSpec(), "")],
)  # fmt: skip
def test_a_node_is_called_by_what_its_method_reads(spec: Spec, words: str) -> None:
    assert method(spec) == words


def test_the_memory_of_its_workers_counts(parent: ParentRun) -> None:
    (outcome,) = run(parent, (team, node()))
    metrics = parent.client.get_run(outcome.artifact.run_id).data.metrics
    assert 1e12 + 1e6 < metrics["stage_peak_memory_bytes"] < 1.1e12


def test_what_it_leaves_in_mlflow(parent: ParentRun) -> None:
    (outcome,) = run(parent, (copy, node()))
    ref = outcome.artifact
    logged = parent.client.get_run(ref.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.tags["mlflow.parentRunId"] == parent.run_id
    assert logged.data.metrics["length"] == 1
    assert logged.data.metrics["stage_peak_memory_bytes"] > 1e6
    assert [m.value for m in parent.client.get_metric_history(ref.run_id, "live_loss")] == [3.0, 2.0]
    folder = parent.workspace.materialize(ref)
    assert (folder / "x.txt").read_text() == "1!"
    manifest = Manifest.read(folder)
    assert manifest.environment["pydantic"]
    assert list((parent.workspace.root / "work").iterdir()) == []


def test_a_damaged_artifact_is_rebuilt(parent: ParentRun) -> None:
    (made,) = run(parent, (copy, node()))
    folder = local_path(made.artifact.uri)
    assert folder is not None
    (folder / "x.txt").write_text("tampered")
    (rebuilt,) = run(parent, (copy, node()))
    assert rebuilt.status == "done"
    assert rebuilt.artifact.digest == made.artifact.digest
    assert rebuilt.artifact.uri != made.artifact.uri
    (again,) = run(parent, (copy, node()))
    assert again.cached


def test_a_failure_is_one_line_never_cached_and_leaves_nothing(parent: ParentRun) -> None:
    for _ in range(2):
        (outcome,) = run(parent, (broken, node()))
        assert (outcome.status, outcome.kind, outcome.reason) == ("failed", "StageError", "it broke on two lines")
        assert outcome.ref is None
        with pytest.raises(StageError, match="it broke"):
            _ = outcome.artifact
    assert CALLS == ["break", "break"]
    assert list((parent.workspace.root / "work").iterdir()) == []
    failed = parent.client.search_runs([parent.experiment_id], "attributes.status = 'FAILED'")
    assert len(failed) == 2
    assert failed[0].data.tags["featherweight.error"] == "it broke on two lines"


def test_a_full_disk_is_told_as_such(parent: ParentRun) -> None:
    (outcome,) = run(parent, (full, node()))
    assert outcome.kind == "ServiceError"
    assert "no space left" in outcome.reason


def test_a_server_that_does_not_answer_is_waited_for(parent: ParentRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 300 <= sum(run_node_module.WAITS_S) < 600
    monkeypatch.setattr(run_node_module, "WAITS_S", (0.01,) * 6)
    (outcome,) = run(parent, (away, node(steps=1)))
    assert (outcome.status, CALLS) == ("done", ["away"] * 4)
    CALLS.clear()
    (outcome,) = run(parent, (away, node(steps=2)))
    assert (outcome.kind, CALLS) == ("ServiceError", ["away"] * 2)


def test_the_key_sees_inputs_seed_spec_version_and_library() -> None:
    plain = copy.key(node(), {"source": "d"})
    assert plain == copy.key(node("elsewhere"), {"source": "d"})
    assert plain != copy.key(node(), {"source": "e"})
    assert plain != copy.key(dataclasses.replace(node(), seed=1), {"source": "d"})
    assert plain != copy.key(node(steps=3), {"source": "d"})
    assert plain != dataclasses.replace(copy, version="2").key(node(), {"source": "d"})
    assert plain != dataclasses.replace(copy, libraries=("typer",)).key(node(), {"source": "d"})


def test_a_scratch_folder_outlives_an_interruption_but_not_a_failure_nor_the_end(parent: ParentRun) -> None:
    folder = parent.workspace.root / "resume"
    node_, key = node(), resumable.key(node(), {})
    for error in (ServiceError, StageError):
        with pytest.raises(error):
            execute(resumable, node_, {}, parent, key)
        assert len(list(folder.iterdir())) == (error is ServiceError)
    execute(resumable, node(steps=2), {}, parent, resumable.key(node(steps=2), {}))
    assert CALLS == ["resume 0", "resume 1", "resume 0"]
    assert not list(folder.iterdir())


def test_a_stage_that_was_ended_beside_others_keeps_its_scratch_folder(parent: ParentRun) -> None:
    """What its process was to do fails, since it was killed; that is no failure of its own."""
    node_, key, stop = node(), resumable.key(node(), {}), Event()
    (parent.workspace.scratch_folder(key) / "0").touch()
    stop.set()
    with pytest.raises(StageError), heeding(stop):
        execute(resumable, node_, {}, parent, key)
    assert len(list(parent.workspace.scratch_folder(key).iterdir())) == 2
    (ended,) = parent.client.search_runs([parent.experiment_id], "attributes.status = 'KILLED'")
    assert ended.data.tags["featherweight.node"] == node_.id


def test_a_scratch_folder_is_that_of_its_key_and_goes_when_forgotten(parent: ParentRun) -> None:
    one, two = (parent.workspace.scratch_folder(key) for key in ("a" * 64, "b" * 64))
    assert one != two
    assert parent.workspace.scratch_folder("a" * 64) == one
    os.utime(one, (0, 0))
    parent.workspace.scratch_folder("b" * 64)
    assert not one.exists()
    assert two.exists()


def test_a_diverging_run_leaves_its_loss_curve(parent: ParentRun) -> None:
    (outcome,) = run(parent, (diverging, node()))
    assert outcome.kind == "DivergenceError"
    (failed,) = parent.client.search_runs([parent.experiment_id], "attributes.status = 'FAILED'")
    page = parent.client.download_artifacts(failed.info.run_id, "failure/loss.html")
    assert "step 2: nan" in Path(page).read_text()


def test_losses_reach_mlflow_while_the_stage_still_runs(parent: ParentRun, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    clock = itertools.count(start=100.0, step=2.0)  # two seconds pass between any two looks at it
    monkeypatch.setattr("tasks.live_progress.time.monotonic", lambda: next(clock))

    @stage("live")
    def live(spec: FinetuneSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
        for step in range(3):
            progress.step(step + 1, 3, loss=float(step))
            (own,) = parent.client.search_runs([parent.experiment_id], "attributes.run_name = 'live'")
            seen.append([metric.value for metric in parent.client.get_metric_history(own.info.run_id, "live_loss")])
        (out / "x.txt").write_text("x")
        return {}

    execute(live, node("live"), {}, parent, "key")
    assert seen == [[0.0], [0.0, 1.0], [0.0, 1.0, 2.0]]


def test_who_acts_on_the_world_is_never_cached_and_takes_the_inputs_that_are_there(parent: ParentRun) -> None:
    end = Node("end", "act", "end", FinetuneSpec(), {"source": "a", "absent": "b"})
    for _ in range(2):
        _, outcome = run(parent, (copy, node()), (acting, end))
        assert outcome.status == "done"
        told = json.loads((parent.workspace.materialize(outcome.artifact) / "told.json").read_text())
        assert told == {"source": ["a", "1!", parent.run_id]}
    assert CALLS == ["copy", "act", "act"]


def real_nodes(checkpoint: Path, text: Path) -> list[Node]:
    """A checkpoint and a text, and a training that reads both."""
    data = DataSpec(source=str(text), evaluation=0.2, calibration=0.2)
    training = FinetuneSpec(steps=3, batch=2, sequence=32)
    return [
        Node("text", "text", "train", TextSpec(data=data, split="train")),
        Node("checkpoint", "load", "tiny", LoadSpec(source=str(checkpoint))),
        Node("tuned", "finetune", "tuned", training, {"checkpoint": "checkpoint", "text": "text"}),
    ]


@pytest.mark.slow
def test_real_stages_run_in_another_process_to_the_same_digests(parent: ParentRun, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """All that a stage's Prefect task takes is pickled; its progress comes back through the channel."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(" ".join(f"word{number * 40 + i} is followed by {i}." for i in range(40)))
    parent = dataclasses.replace(parent, progress=ProgressChannel(tmp_path / "progress.jsonl"))
    refs: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for node_ in real_nodes(tiny_checkpoint, text):
            work = (stage_named(node_.stage), node_, {name: refs[id] for name, id in node_.inputs.items()}, parent, node_.id)
            here, there = run_stage(*work), pool.submit(run_stage, *work).result()
            assert there["digest"] == here["digest"]
            assert there["run_id"] != here["run_id"]
            refs[node_.id] = there
    assert parent.progress.path
    told = [json.loads(line) for line in parent.progress.path.read_text().splitlines()]
    assert {"node": "tuned", "done": 3, "total": 3} in [
        {key: message["step"][key] for key in ("node", "done", "total")} for message in told if "step" in message
    ]
    assert [metric.step for metric in parent.client.get_metric_history(refs["tuned"]["run_id"], "live_loss")] == [1, 2, 3]


@stage("native", native=True)
def native(spec: FinetuneSpec, *, out: Path, seed: int, checkpoint: Path | None = None, progress: Progress = Progress()) -> Metrics:
    """What a library does with a wrong address at one step, and with the right one at another; refuses a third."""
    if spec.steps == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if spec.steps == 3:
        raise RecipeError("three steps are too many")
    (out / "process").write_text(str(os.getpid()))
    return {"device_is_cuda": float(os.environ[device.VARIABLE] == device.CUDA)}


def test_a_native_library_that_crashes_on_a_gpu_costs_its_node_alone(parent: ParentRun) -> None:
    on_gpu = [
        dataclasses.replace(node(name, steps), device="cuda") for name, steps in (("crashes", 1), ("works", 2), ("refuses", 3))
    ]
    crashed, worked, refused = run(parent, *((native, one) for one in on_gpu))
    assert (crashed.status, crashed.kind) == ("failed", "StageError")
    assert "native: its process ended with signal 11" in crashed.reason
    assert worked.status == "done" and worked.artifact.metrics["device_is_cuda"] == 1.0
    made = parent.workspace.materialize(worked.artifact) / "process"
    assert made.read_text() != str(os.getpid())
    assert (refused.kind, refused.reason) == ("RecipeError", "three steps are too many")


@stage("weights")
def weights(spec: FinetuneSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
    (out / "model.safetensors").write_bytes(b"1234")
    return {}


@pytest.mark.parametrize(("size", "crashes"), [(4, True), (5, False)])
def test_a_crash_with_a_large_checkpoint_costs_its_node_alone_on_a_cpu_too(
    size: int, crashes: bool, parent: ParentRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of the flow is that of a small one's stage."""
    monkeypatch.setattr(nested_run, "LARGE_BYTES", size)
    steps = 1 if crashes else 2
    given = node("given"), dataclasses.replace(node("used", steps, checkpoint="given"), device="cpu")
    _, used = run(parent, (weights, given[0]), (native, given[1]))
    if crashes:
        assert "native: its process ended with signal 11" in used.reason
    else:
        assert (parent.workspace.materialize(used.artifact) / "process").read_text() == str(os.getpid())
