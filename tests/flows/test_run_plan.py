"""Running a plan: what one variant's failure costs the others, and what a stopped training costs itself."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from featherweight.checkpoint.spec import LoadSpec
from featherweight.progress import Metrics, Progress
from featherweight.recipe.plan import Node, Plan
from featherweight.store.artifact import ArtifactRef
from featherweight.system.processes import WORKERS_PEAK
from featherweight.system.progress_channel import ChannelProgress, ProgressChannel
from featherweight.text.documents import Document, write_documents
from featherweight.training.spec import FinetuneSpec
from featherweight.training.threads import cores
from tasks.finetune import finetune
from tasks.nested_run import execute
from tasks.outcome import Outcomes
from tasks.parent_run import ParentRun
from tasks.stage import stage
from tests.support.stores import new_workspace


@stage("given")
def given(spec: LoadSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
    """A folder that is there already."""
    shutil.copytree(str(spec.source), out, dirs_exist_ok=True)
    return {}


class Stop(ChannelProgress):
    """Ctrl-C at a step; remembers what it was told."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__(ProgressChannel(), "recovery")
        self.at, self.notes, self.steps = at, [], []

    def step(self, done: int, total: int, **values: float) -> None:
        self.steps.append(done)
        if done == self.at:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


class Told(ProgressChannel):
    """A channel whose stage tells `stop`."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def progress(self, node: str) -> Stop:
        return self.stop


def open_parent(root: Path) -> ParentRun:
    workspace = new_workspace(root)
    client = workspace.client()
    experiment = workspace.experiment(client, "test")
    return ParentRun(workspace, experiment, client.create_run(experiment).info.run_id)


def inputs_of_finetune(parent: ParentRun, checkpoint: Path, text: Path) -> dict[str, ArtifactRef]:
    """References to a checkpoint and to text, which is written to the folder `text` before."""
    write_documents(text, [Document("json", Path(json.__file__).read_text())])
    sources = {"checkpoint": checkpoint, "text": text}
    nodes = {name: Node(name, "given", name, LoadSpec(source=str(path))) for name, path in sources.items()}
    return {name: execute(given, node, {}, parent, name) for name, node in nodes.items()}


@pytest.mark.slow
def test_a_stopped_stage_goes_on_where_it_was_to_the_same_digest(tiny_checkpoint: Path, tmp_path: Path) -> None:
    parent = open_parent(tmp_path / "workspace")
    refs = inputs_of_finetune(parent, tiny_checkpoint, tmp_path / "text")
    node = Node("recovery", "finetune", "recovery", FinetuneSpec(steps=6, batch=2, sequence=32, save_every_s=0))
    whole = execute(finetune, node, refs, parent, "another key")
    key, stop, again = finetune.key(node, {name: ref.digest for name, ref in refs.items()}), Stop(at=4), Stop()
    with pytest.raises(KeyboardInterrupt):
        execute(finetune, node, refs, dataclasses.replace(parent, progress=Told(stop)), key)
    assert [folder.name for folder in (parent.workspace.root / "resume").iterdir()] == [key[:32]]
    resumed = execute(finetune, node, refs, dataclasses.replace(parent, progress=Told(again)), key)
    assert again.notes == ["resuming at step 3"]
    assert resumed.digest == whole.digest
    curve = parent.client.get_metric_history(resumed.run_id, "live_loss")
    assert [point.step for point in curve] == [1, 2, 3, 4, 5, 6]
    assert not list((parent.workspace.root / "resume").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(cores() < 2, reason="needs two cores")
def test_the_recorded_peak_counts_the_processes_that_train(tiny_checkpoint: Path, tmp_path: Path) -> None:
    parent = open_parent(tmp_path / "workspace")
    refs = inputs_of_finetune(parent, tiny_checkpoint, tmp_path / "text")
    node = Node("recovery", "finetune", "recovery", FinetuneSpec(steps=1, batch=2, sequence=32, processes=2))
    logged = parent.client.get_run(execute(finetune, node, refs, parent, "key").run_id).data.metrics
    assert logged[WORKERS_PEAK] > 2 * 1e8, "each of them imports torch"
    assert logged["stage_peak_memory_bytes"] > logged[WORKERS_PEAK] + 1e8


def test_nan_weights_cost_their_own_variant_only(
    tiny_checkpoint: Path, tmp_path: Path, harness: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import Flow

    from flows import optimize

    write_documents(tmp_path / "text", [Document("json", Path(json.__file__).read_text())])
    damaged = shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    sources = {"text": tmp_path / "text", "damaged": damaged, "sound": tiny_checkpoint}
    nodes = [Node(name, "given", name, LoadSpec(source=str(path))) for name, path in sources.items()]
    spec = FinetuneSpec(steps=2, batch=2, sequence=32)
    for name in ("damaged", "sound"):
        inputs = {"checkpoint": name, "text": "text", "calibration": "text"}
        nodes.append(Node(f"{name}+finetune", "finetune", name, spec, inputs))
    plan = Plan({node.id: node for node in nodes}, (), {})
    parent = open_parent(tmp_path / "workspace")
    client, experiment = parent.client, parent.experiment_id
    monkeypatch.setattr(optimize, "stage_named", {"given": given, "finetune": finetune}.__getitem__)
    outcomes: Outcomes = Flow(lambda: optimize.run_plan(plan, parent), name="test", persist_result=False)()
    assert {id: outcome.status for id, outcome in outcomes.items()} == {
        "text": "done",
        "damaged": "done",
        "sound": "done",
        "damaged+finetune": "failed",
        "sound+finetune": "done",
    }
    assert outcomes["damaged+finetune"].reason.startswith("training diverged at step 1: loss nan")
    (failed,) = client.search_runs([experiment], "attributes.status = 'FAILED'")
    assert [file.path for file in client.list_artifacts(failed.info.run_id, "failure")] == ["failure/loss.html"]
    (sound,) = client.search_runs([experiment], "attributes.run_name = 'sound+finetune'")
    assert len(client.get_metric_history(sound.info.run_id, "live_loss")) == 2
    assert not list((parent.workspace.root / "resume").iterdir())
