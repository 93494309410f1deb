"""Two versions side by side by verified figures, and what depends on a checkpoint, data or a library."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from featherweight.errors import GateError, IntegrityError, RecipeError
from featherweight.measure.measurement import Comparison, Measurement, Quality, Speed
from featherweight.registry.lineage import build
from featherweight.registry.packed_text import PACKED, packed
from featherweight.registry.registry import Registry
from featherweight.store.workspace import Workspace, local_path
from flows.comparing import compared
from flows.impact import depending
from tests.support.registering import MODEL, Bench, bench

pytestmark = pytest.mark.slow
SPEED = Speed(1, 1, 4, 4, (1.0,) * 5, (0.1,) * 5)
BASELINE = Measurement("torch", Quality((8.0,) * 16, (4,) * 16, (8,) * 16), (SPEED,), 1000, 4000, 0.1)


def registered(desk: Bench, name: str, loss: float, seconds: float, source: str, grid: str) -> None:
    """A version whose evaluation holds the losses of its windows, as a stage leaves it."""
    windows = tuple(loss + 0.01 * (number % 4) for number in range(16))
    speed = Speed(1, 1, 4, 4, (seconds,) * 5, (0.1,) * 5)
    measured = Comparison(replace(BASELINE, quality=Quality(windows, (4,) * 16, (8,) * 16), speeds=(speed,)), BASELINE)
    origin = desk.artifact(f"{name}/checkpoint", "load", spec={"source": source})
    text = desk.artifact(f"{name}/text", "text", spec={"data": {"source": f"texts/{source}"}})
    made = desk.artifact(
        name, parents={"checkpoint": origin[1].digest, "text": text[1].digest}, environment={"torch": "2.13", "ctranslate2": grid}
    )
    folder = desk.root / "artifacts-of-runs" / f"{name}-measured"
    folder.mkdir()
    measured.write(folder)
    parents = {"served": made[1].digest, "evaluation": desk.origin[1][1].digest}
    told = desk.publish(folder, f"{name}/evaluate", "evaluate", parents=parents, metrics=measured.metrics())
    recipe = f"name: t\nstages: {{quantize: {{w: {{grid: {grid}}}}}}}\npromote: {{model: {MODEL}}}\n"
    known = {"variant": name, "recipe": recipe, "run_id": desk.run_id, "metrics": measured.metrics(), "commit": "c"}
    graph = build([origin, text, desk.origin[1], made, told], made[1].digest, measured=told[1].digest, **known)  # type: ignore[arg-type]
    desk.registry.register(desk.record(name, made[0], graph, recipe=recipe, metrics=measured.metrics()))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = bench(tmp_path_factory.mktemp("compare"))
    registered(made, "one", 8.0, 0.5, "checkpoints/may", "int8")
    registered(made, "two", 8.4, 0.25, "checkpoints/june", "int4")
    made.registry.transition(MODEL, "2", "production", who="ada", why="x")
    return made


@pytest.fixture
def workspace(desk: Bench) -> Workspace:
    return Workspace.at(desk.root)


def test_figures_stand_side_by_side_with_a_verdict_beyond_the_intervals(workspace: Workspace) -> None:
    found = compared(workspace, f"{MODEL}/1", "2")
    rows = {row.name: row.verdict for row in found.figures}
    assert rows == {"quality loss": "worse", "bits per byte": "worse", "speed at batch 1": "better"} | dict.fromkeys(
        ("size", "peak memory"), "within the noise"
    )
    assert found.paired is not None
    assert found.paired.low == pytest.approx(0.4 / 8.015, rel=0.01)
    assert found.quality == "bits per byte, 16 windows paired: +4.99 % [+4.99, +4.99] (+ is worse)"
    assert [asdict(one) for one in found.recipe] == [{"part": "stages.quantize.w.grid", "a": "int8", "b": "int4"}]
    parts = {one.part: (one.a, one.b) for one in found.lineage}
    assert parts["library ctranslate2"] == ("int8", "int4")
    assert parts["checkpoint"][0].endswith(" checkpoints/may")
    text = found.to_text()
    assert "recipe: 1 difference\n  stages.quantize.w.grid: int8 → int4" in text
    assert "little-llama/2 is" in text.splitlines()[0]
    assert json.loads(json.dumps(found.to_dict()))["paired"]["value"] == found.paired.value
    same = compared(workspace, MODEL, "@champion")
    assert (same.recipe, same.lineage, {row.verdict for row in same.figures}) == ((), (), {"within the noise"})


def test_what_depends_is_found_by_digest_source_and_library(desk: Bench, workspace: Workspace) -> None:
    (node,) = (one for one in desk.registry.all_models()[0].versions.values() if one.version == "2")
    nodes = json.loads(desk.registry.lineage_json(node))["nodes"]
    digest = next(one["digest"] for one in nodes if one["stage"] == "load")
    for asked, versions in (
        ({"checkpoint": digest[:12]}, ["2"]),
        ({"checkpoint": str(Path("checkpoints/may").absolute())}, ["1"]),
        ({"data": desk.origin[1][1].digest}, ["2", "1"]),  # the deployed first
        ({"data": "texts/checkpoints/may"}, ["1"]),
        ({"library": "ctranslate2==int8"}, ["1"]),
        ({"library": "torch"}, ["2", "1"]),
        ({"library": "tvm"}, []),
    ):
        found = depending(workspace, **({"checkpoint": "", "data": "", "library": ""} | asked))
        assert [one.version for one in found.affected] == versions, asked
    assert "2 of 2 versions depend on library torch, 1 of them deployed" in depending(workspace, "", "", "torch").to_text()
    with pytest.raises(RecipeError, match="give one of --checkpoint, --data and --library"):
        depending(workspace, "a", "b", "")


def test_what_cannot_be_believed_is_said(tmp_path: Path) -> None:
    desk = bench(tmp_path)
    registered(desk, "one", 8.0, 0.5, "a", "int8")
    workspace = Workspace.at(desk.root)
    lineage = Path(str(local_path(desk.registry.get(MODEL, "1").source))) / "lineage.json"
    with pytest.raises(GateError, match="has no version or alias '7'"):
        compared(workspace, f"{MODEL}/1", "7")
    lineage.write_text(lineage.read_text().replace("int8", "int2"))
    with pytest.raises(IntegrityError, match="was altered after it was registered"):
        compared(workspace, f"{MODEL}/1", "1")
    assert depending(workspace, "", "", "torch").unknown == ()  # the version's own tag has it, by the registered digest
    for told in (packed(lineage.read_text())[PACKED], "no base64", "H4sI"):
        desk.registry.client.set_model_version_tag(MODEL, "1", f"featherweight.{PACKED}", told)
        (unknown,) = depending(workspace, "", "", "torch").unknown
    assert "little-llama/1: lineage.json of models:/little-llama/1 was altered" in unknown
    assert Registry(desk.registry.tracking_uri).all_models()[0].history == desk.registry.history(MODEL)
