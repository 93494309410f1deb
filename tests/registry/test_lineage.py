"""Lineage: rebuilt from a registered version alone, told, and verified down to the bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from featherweight.errors import GateError, IntegrityError
from featherweight.registry.history import GateResult
from featherweight.registry.lineage import LineageGraph, LineageNode, build, code_commit, from_registry, source_of, verify
from featherweight.registry.mlflow_store import ENTRY
from featherweight.store.artifact import ArtifactRef, Manifest
from featherweight.store.workspace import Workspace, local_path
from flows.audit import audit
from tests.support.registering import METRICS, MODEL, Bench, bench, desk

pytestmark = pytest.mark.slow

__all__ = ["desk"]
RECIPE = "name: test\nseed: 0\n"


def chain(desk: Bench) -> dict[str, tuple[ArtifactRef, Manifest]]:
    """text → train → quantize → export → evaluate, and a variant that lost."""
    made: dict[str, tuple[ArtifactRef, Manifest]] = {}

    def add(name: str, stage: str, /, spec: dict[str, object] | None = None, **inputs: str) -> None:
        parents = {key: made[value][1].digest for key, value in inputs.items()}
        made[name] = desk.artifact(name, stage, parents=parents, spec=spec or {}, machine={"cpu": "AVX2"})

    add("text/train", "text")
    add("text/evaluation", "text")
    add("checkpoint", "train", {"steps": 300}, text="text/train")
    add("w8", "quantize", {"grid": "int8"}, checkpoint="checkpoint")
    add("w8/ct2", "export", checkpoint="w8")
    add("loser", "export", checkpoint="checkpoint")
    add("w8/ct2/evaluate", "evaluate", served="w8/ct2", evaluation="text/evaluation")
    return made


def graph_of(desk: Bench, made: dict[str, tuple[ArtifactRef, Manifest]]) -> LineageGraph:
    return build(
        reversed(made.values()),
        made["w8/ct2"][1].digest,
        variant="w8/ct2",
        recipe=RECIPE,
        run_id=desk.run_id,
        flow_run_id="prefect-1",
        measured=made["w8/ct2/evaluate"][1].digest,
        metrics=METRICS,
    )


def registered(desk: Bench) -> dict[str, tuple[ArtifactRef, Manifest]]:
    made = chain(desk)
    desk.registry.register(desk.record("w8/ct2", made["w8/ct2"][0], graph_of(desk, made)))
    return made


def folder(made: dict[str, tuple[ArtifactRef, Manifest]], name: str) -> Path:
    found = local_path(made[name][0].uri)
    assert found is not None
    return found


def test_graph_holds_the_ancestors_only_parents_first(desk: Bench) -> None:
    made = chain(desk)
    graph = graph_of(desk, made)
    order = ["text/train", "checkpoint", "w8", "w8/ct2", "text/evaluation", "w8/ct2/evaluate"]
    assert [node.id for node in graph.nodes] == order
    assert graph.checkpoint is not None
    assert graph.checkpoint.digest == made["checkpoint"][1].digest
    assert graph.data == {name: made[name][1].digest for name in ("text/train", "text/evaluation")}
    above = graph.parents(graph.nodes[-1])
    assert [(name, node.id) for name, node in above] == [("served", "w8/ct2"), ("evaluation", "text/evaluation")]
    node = graph.nodes[2]
    assert (node.spec, node.run_id, node.machine, node.environment) == (
        {"grid": "int8"},
        desk.run_id,
        {"cpu": "AVX2"},
        {"torch": "2.13"},
    )


def test_graph_tells_why_it_won_and_not_what_the_losers_were_made_from(desk: Bench) -> None:
    made = chain(desk)
    loser = desk.artifact("loser/evaluate", "evaluate", parents={"served": made["loser"][1].digest})
    parents = {"w8/ct2": made["w8/ct2/evaluate"][1].digest, "loser": loser[1].digest}
    decided = desk.artifact("decide", "decide", parents=parents)
    graph = build(
        [*made.values(), loser, decided],
        made["w8/ct2"][1].digest,
        variant="w8/ct2",
        recipe=RECIPE,
        run_id=desk.run_id,
        measured=made["w8/ct2/evaluate"][1].digest,
        decided=decided[1].digest,
        reason="twice as fast",
    )
    last = graph.nodes[-1]
    assert (last.stage, last.parents["loser"], graph.reason) == ("decide", loser[1].digest, "twice as fast")
    assert [(name, node.id) for name, node in graph.parents(last)] == [("w8/ct2", "w8/ct2/evaluate")]
    assert not {"loser", "loser/evaluate"} & {node.id for node in graph.nodes}
    desk.registry.register(desk.record("w8/ct2", made["w8/ct2"][0], graph))
    told = from_registry(desk.registry, MODEL, "1")
    assert {verdict.state for verdict in verify(told, desk.registry)} == {"ok"}
    text = told.to_text()
    assert "won by       twice as fast" in text
    assert f"decide decide [{decided[1].digest[:12]}]" in text


def test_lineage_of_before_the_decision_was_in_it_is_read(desk: Bench) -> None:
    stored = json.loads(graph_of(desk, chain(desk)).to_json()) | {"version": 1}
    del stored["reason"]
    assert LineageGraph.from_json(json.dumps(stored)).reason == ""


def test_graph_survives_its_json(desk: Bench) -> None:
    graph = graph_of(desk, chain(desk))
    assert LineageGraph.from_json(graph.to_json()) == graph
    later = json.loads(graph.to_json()) | {"version": 3}
    with pytest.raises(IntegrityError, match="lineage of version 3; this Featherweight reads up to 2"):
        LineageGraph.from_json(json.dumps(later))
    for broken in ("{}", "nothing", '{"version": 1, "nodes": [{"id": 1}]}'):
        with pytest.raises(IntegrityError, match="not a readable lineage"):
            LineageGraph.from_json(broken)


def test_missing_parent_is_refused(desk: Bench) -> None:
    made = chain(desk)
    del made["text/train"]
    with pytest.raises(IntegrityError, match="lineage is incomplete: no artifact with digest"):
        graph_of(desk, made)


def test_stage_that_changed_nothing_ends_the_walk(desk: Bench) -> None:
    ref, manifest = desk.artifact("same")
    again = manifest.model_copy(update={"parents": {"checkpoint": manifest.digest}})
    graph = build([(ref, again)], ref.digest, variant="same", recipe=RECIPE, run_id=desk.run_id)
    assert [node.id for node in graph.nodes] == ["same"]


def test_commit_of_a_checkout_is_a_commit() -> None:
    commit = code_commit()
    assert commit == "unknown" or len(commit.rstrip("+")) == 40


def test_registered_version_alone_tells_everything(desk: Bench) -> None:
    made = registered(desk)
    desk.registry.transition(MODEL, "1", "production", who="ada", why="it is fast")
    lineage = from_registry(desk.registry, MODEL)
    assert lineage == from_registry(desk.registry, MODEL, "1")
    assert lineage.graph == graph_of(desk, made)
    assert (lineage.stage, lineage.engine, lineage.digest) == ("production", "torch", made["w8/ct2"][1].digest)
    assert [entry.why for entry in lineage.history] == ["it is fast"]
    told = json.loads(lineage.to_json())
    assert (told["graph"]["recipe"], told["graph"]["flow_run_id"], told["history"][0]["who"]) == (RECIPE, "prefect-1", "ada")


def test_text_shows_the_tree_the_numbers_and_the_history(desk: Bench) -> None:
    made = registered(desk)
    desk.registry.transition(MODEL, "1", "production", who="ada", why="it is fast")
    text = from_registry(desk.registry, MODEL).to_text()
    short = {name: one[1].digest[:12] for name, one in made.items()}
    assert (
        f"export w8/ct2 [{short['w8/ct2']}]\n"
        f"└─ checkpoint: quantize w8 [{short['w8']}]\n"
        f"   └─ checkpoint: train checkpoint [{short['checkpoint']}]\n"
        f"      └─ text: text text/train [{short['text/train']}]\n"
        f"evaluate w8/ct2/evaluate [{short['w8/ct2/evaluate']}]\n"
        f"├─ evaluation: text text/evaluation [{short['text/evaluation']}]\n"
        f"└─ served: export w8/ct2 [{short['w8/ct2']}] ↑\n"
    ) in text
    assert "little-llama version 1 (champion), production" in text
    assert "torch 2.13" in text
    assert "cpu AVX2" in text
    assert "none → production  by ada: it is fast" in text
    assert "speedup_1                    8\n" in text
    assert "loser" not in text


def verdicts(desk: Bench) -> dict[str, tuple[str, str]]:
    return {one.part: (one.state, one.reason) for one in verify(from_registry(desk.registry, MODEL, "1"), desk.registry)}


def test_text_names_the_libraries_of_every_stage_and_a_line_for_each_gate(desk: Bench) -> None:
    made = chain(desk)
    decided = desk.artifact(
        "decide", "decide", parents={"w8/ct2": made["w8/ct2/evaluate"][1].digest}, environment={"great-expectations": "1.24"}
    )
    told = {"run_id": desk.run_id, "measured": made["w8/ct2/evaluate"][1].digest, "decided": decided[1].digest}
    graph = build([*made.values(), decided], made["w8/ct2"][1].digest, variant="w8/ct2", recipe=RECIPE, **told)
    desk.registry.register(desk.record("w8/ct2", made["w8/ct2"][0], graph))
    judged = GateResult("max_quality_loss", True, "quality loss +0.5 %, allowed +1.0 %")
    desk.registry.transition(MODEL, "1", "production", who="ada", why="a test", gates=[judged])
    lines = from_registry(desk.registry, MODEL, "1").to_text().splitlines()
    assert "libraries    great-expectations 1.24, torch 2.13" in lines
    assert lines[-2].endswith("none → production  by ada: a test")
    assert lines[-1] == "    ✓ max_quality_loss: quality loss +0.5 %, allowed +1.0 %"


def test_verify_finds_everything_in_order(desk: Bench) -> None:
    registered(desk)
    found = verdicts(desk)
    parts = {"registered files", "text/train", "checkpoint", "w8", "w8/ct2", "text/evaluation", "w8/ct2/evaluate", "history"}
    assert found.keys() == parts
    assert {state for state, _ in found.values()} == {"ok"}


def test_verify_tells_altered_from_missing(desk: Bench) -> None:
    made = registered(desk)
    weights = folder(made, "w8") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    for path in folder(made, "text/train").iterdir():
        path.unlink()
    folder(made, "text/train").rmdir()
    found = verdicts(desk)
    assert found.pop("w8")[0] == "altered"
    state, reason = found.pop("text/train")
    assert (state, "is not there" in reason) == ("missing", True)
    assert {state for state, _ in found.values()} == {"ok"}
    checked = audit(Workspace.at(desk.root), f"{MODEL}/1", True)
    with pytest.raises(IntegrityError, match="not what was registered: text/train is missing, w8 is altered"):
        checked.raise_if_wrong()


def test_verify_finds_altered_registered_files_and_history(desk: Bench) -> None:
    registered(desk)
    version = desk.registry.transition(MODEL, "1", "production", who="ada", why="fast")
    served = desk.registry.served_folder(version, desk.root)
    (served / "model.safetensors").unlink()  # the link only: the stage's own artifact stays whole
    (served / "model.safetensors").write_bytes(b"other weights")
    client, side = desk.registry.client, f"{MODEL}.history"
    entry = client.get_model_version(side, "1").tags[ENTRY]
    client.set_model_version_tag(side, "1", ENTRY, entry.replace("fast", "slow"))
    found = verdicts(desk)
    assert found.pop("registered files") == ("altered", f"artifact {served}: file model.safetensors is altered")
    assert found.pop("history")[0] == "altered"
    assert {state for state, _ in found.values()} == {"ok"}


def test_altered_lineage_is_not_believed(desk: Bench) -> None:
    registered(desk)
    stored = local_path(desk.registry.get(MODEL, "1").source)
    assert stored is not None
    (stored / "lineage.json").write_text((stored / "lineage.json").read_text().replace("AVX2", "AVX9"))
    with pytest.raises(IntegrityError, match=r"lineage\.json of models:/little-llama/1 was altered"):
        from_registry(desk.registry, MODEL, "1")


def test_a_source_is_a_text_of_the_spec_or_of_its_data() -> None:
    told = [{"source": "a"}, {"data": {"source": "b"}}, {"data": "c"}, {"data": None}, {}]
    assert [source_of(one) for one in told] == ["a", "b", "", "", ""]


def test_unknown_references_are_refused(desk: Bench) -> None:
    registered(desk)
    with pytest.raises(GateError, match="no version or alias 'champion'; versions: 1; aliases: none"):
        from_registry(desk.registry, MODEL)
    with pytest.raises(GateError, match="no registered model 'nobody'; registered: little-llama"):
        from_registry(desk.registry, "nobody")


def test_artifacts_on_s3_are_fetched_and_verified(s3_server, tmp_path: Path) -> None:
    desk = bench(tmp_path, artifacts=f"s3://{s3_server.bucket}/mlflow")
    ref, manifest = desk.artifact("w8/torch")
    here = folder({"w8": (ref, manifest)}, "w8")
    desk.registry.client.log_artifacts(desk.run_id, str(here), "artifact")
    remote = desk.registry.client.get_run(desk.run_id).info.artifact_uri + "/artifact"
    node = replace(LineageNode.of(ref, manifest), uri=remote)
    graph = build([(ref, manifest)], ref.digest, variant="w8", recipe=RECIPE, run_id=desk.run_id)
    desk.registry.register(desk.record("w8", ref, replace(graph, nodes=(node,))))
    assert {part: state for part, (state, _) in verdicts(desk).items()} == dict.fromkeys(
        ("registered files", "w8/torch", "history"), "ok"
    )
    prefix = remote.removeprefix(f"s3://{s3_server.bucket}/")
    (s3_server.folder / prefix / "model.safetensors").write_bytes(b"other weights")
    assert verdicts(desk)["w8/torch"][0] == "altered"
