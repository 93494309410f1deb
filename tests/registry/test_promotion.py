"""The promotion gate: what it compares, what it refuses and why, and that a refusal changes nothing."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import pytest

from featherweight.errors import GateError, IntegrityError
from featherweight.measure.goals import Decision
from featherweight.measure.spec import ConstraintsSpec
from featherweight.recipe.recipe import PromoteSpec, RegisterSpec
from featherweight.registry.gate import GatesRefused, promotion_gate
from featherweight.registry.keys import Keys
from featherweight.registry.lineage import LineageGraph
from featherweight.registry.promotion import Promotion, gated_transition
from featherweight.registry.registry import RegisteredVersion
from featherweight.store.workspace import Workspace, local_path
from featherweight.system.user import user_name
from flows.by_hand import approve_by_hand
from tasks.parent_run import ParentRun
from tasks.promote import promote
from tasks.register import FILE, Registration, register, register_winner
from tests.support.registering import METRICS, MODEL, Bench, desk

pytestmark = pytest.mark.slow

__all__ = ["desk"]
FREE = ConstraintsSpec()


def version(number: str = "2", /, evaluation: str = "e1", checkpoint: str = "c1", **changes: float) -> RegisteredVersion:
    """A version with METRICS, changed; a quality change moves bits per byte along (baseline: 2.0)."""
    metrics = METRICS | changes
    if "quality_change" in changes:
        around = {f"quality_change_{end}": changes["quality_change"] + way for end, way in (("low", -0.005), ("high", 0.005))}
        metrics = METRICS | {"bits_per_byte": 2.0 * (1 + changes["quality_change"])} | around | changes
    tags = {"metrics": json.dumps(metrics), "evaluation": evaluation, "checkpoint": checkpoint, "variant": f"v{number}"}
    tags = {f"featherweight.{name}": value for name, value in {**tags, "digest": number, "objective": "speedup@1"}.items()}
    return RegisteredVersion(MODEL, number, "none", (), "run", "", tags, 0.0)


def faster(**changes: float) -> dict[str, float]:
    return {"speedup_1": 9.0, "speedup_1_low": 8.6, "speedup_1_high": 9.4, **changes}


def test_what_another_recipe_made_under_another_name_is_registered_under_this_ones(desk: Bench, tmp_path: Path) -> None:
    theirs = desk.artifact("ct2", parents={"checkpoint": desk.origin[0][1].digest})
    (tmp_path / "decided").mkdir()
    (tmp_path / "out").mkdir()
    decision = Decision("float32/ctranslate2", "the best", {}, ("float32/ctranslate2",))
    (tmp_path / "decided" / "decision.json").write_text(json.dumps(dataclasses.asdict(decision)))
    made = dict(zip(("checkpoint", "text/evaluation"), desk.origin, strict=True))
    made |= {"ours": theirs, "ours/evaluate": desk.measurement("ct2", theirs[1].digest, METRICS)}
    made["decide"] = desk.publish(tmp_path / "decided", "decide", "decide")
    artifacts = {id: ref for id, (ref, _) in made.items()}
    spec = RegisterSpec(
        model=MODEL, recipe="name: test", constraints=FREE, objective="size", nodes={decision.winner: ("ours", "ours/evaluate")}
    )
    parent = ParentRun(Workspace(tmp_path, desk.registry.tracking_uri), desk.experiment, desk.run_id)
    folders = {id: local_path(ref.uri) for id, ref in artifacts.items()}
    register(spec, inputs=folders, artifacts=artifacts, parent=parent, out=tmp_path / "out")
    assert Registration.read(tmp_path / "out").variant == decision.winner


CHAMPION = version("1")


def test_without_a_champion_only_the_constraints_judge() -> None:
    gates = promotion_gate(version(), None, ConstraintsSpec(max_quality_loss=0.02, min_speedup=7.0))
    assert [(gate.gate, gate.passed) for gate in gates] == [
        ("max_quality_loss", True),
        ("min_speedup", True),
        ("champion", True),
    ]
    assert (gates[0].value, gates[0].bound) == (0.015, 0.02)
    assert (gates[1].reason, gates[1].value) == ("speed 8.00x [7.50, 8.50] at batch 1, wanted 7.00x", 7.5)


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        ({"max_quality_loss": 0.012}, "max_quality_loss: quality loss +1.00 % [+0.50, +1.50], allowed +1.20 %"),
        ({"min_speedup": 7.8}, "min_speedup: speed 8.00x [7.50, 8.50] at batch 1, wanted 7.80x"),
        ({"max_size_bytes": 999}, "max_size_bytes: size 0.000954 MiB, allowed 0.000953 MiB"),
        ({"max_peak_memory_bytes": 4000}, "max_peak_memory_bytes: peak memory 0.00477 MiB, allowed 0.00381 MiB"),
        ({"max_p95_latency_s": 1.0}, "max_p95_latency_s: p95_latency_s_1 was not measured"),
    ],
)
def test_constraints_hold_with_the_confidence_bound(constraint: dict[str, float], said: str) -> None:
    with pytest.raises(GateError) as caught:
        promotion_gate(version(), None, ConstraintsSpec(**constraint))
    assert str(caught.value) == f"refused to promote version 2 (v2) of 'little-llama'; {said}"


def test_faster_candidate_of_equal_quality_passes() -> None:
    gates = {gate.gate: gate for gate in promotion_gate(version(**faster()), CHAMPION, FREE)}
    assert all(gate.passed for gate in gates.values())
    assert gates["objective speedup@1"].reason == (
        "speed 9.00x [8.60, 9.40] at batch 1 is not worse than the champion's 8.00x [7.50, 8.50]"
    )
    assert gates["progress"].reason == "better in speed 9.00x against 8.00x"


def test_slower_candidate_is_refused_with_the_numbers() -> None:
    slow = version(speedup_1=7.0, speedup_1_low=6.8, speedup_1_high=7.2, quality_change=0.001)
    with pytest.raises(
        GateError, match=r"speed 7.00x \[6.80, 7.20\] at batch 1 is worse than the champion's 8.00x \[7.50, 8.50\]"
    ) as caught:
        promotion_gate(slow, CHAMPION, FREE)
    assert "over version 1 (v1)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_worse_quality_is_refused_beyond_the_intervals_only() -> None:
    assert promotion_gate(version(**faster(quality_change=0.018)), CHAMPION, FREE)
    with pytest.raises(GateError, match=r"quality: bits per byte 2\.06 .* is worse than the champion's 2\.02"):
        promotion_gate(version(**faster(quality_change=0.03)), CHAMPION, FREE)


def test_loss_that_the_recipe_allows_is_no_reason_to_refuse() -> None:
    allowed = ConstraintsSpec(max_quality_loss=0.04)
    assert promotion_gate(version(**faster(quality_change=0.03)), CHAMPION, allowed)
    with pytest.raises(GateError, match=r"max_quality_loss: quality loss \+6.00 % \[\+5.50, \+6.50\], allowed \+4.00 %"):
        promotion_gate(version(**faster(quality_change=0.06)), CHAMPION, allowed)


def test_new_checkpoint_is_judged_by_bits_per_byte() -> None:
    """Its loss against its own, worse, baseline is small; what counts is what it serves."""
    worse = version("2", "e1", "c2", **faster(bits_per_byte=2.5))
    with pytest.raises(GateError, match=r"quality: bits per byte 2\.5 .* is worse than the champion's 2\.02"):
        promotion_gate(worse, CHAMPION, FREE)
    better = version("2", "e1", "c2", bits_per_byte=1.9)
    assert promotion_gate(better, CHAMPION, FREE)[-1].reason == "better in bits per byte 1.9 against 2.02"


def test_other_text_is_judged_by_the_loss_against_the_common_checkpoint() -> None:
    assert promotion_gate(version("2", "e2", "c1", **faster(bits_per_byte=3.0)), CHAMPION, FREE)
    worse = version("2", "e2", "c1", **faster(quality_change=0.03))
    with pytest.raises(GateError, match=r"quality loss \+3.00 % .* is worse than the champion's \+1.00 %"):
        promotion_gate(worse, CHAMPION, FREE)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(GateError, match="comparable: measured on other evaluation text and from another checkpoint"):
        promotion_gate(version("2", "e2", "c2", **faster()), CHAMPION, FREE)


def test_candidate_that_is_better_in_nothing_is_refused() -> None:
    """Within the noise on every count: champions must not drift downwards."""
    dim = version(speedup_1=7.9, bits_per_byte=2.021, size_bytes=1001)
    with pytest.raises(GateError, match="progress: better than the champion in none of quality, speed and size"):
        promotion_gate(dim, CHAMPION, FREE)
    assert promotion_gate(version(speedup_1=7.9, size_bytes=900), CHAMPION, FREE)


def test_other_objectives_compare_their_own_figure() -> None:
    small = version(speedup_1=5.0, speedup_1_low=4.0, speedup_1_high=6.0, size_bytes=500)
    assert promotion_gate(small, CHAMPION, FREE, "size")
    with pytest.raises(GateError, match=r"objective size: size 0\.00191 MiB is worse than the champion's 0\.000954 MiB"):
        promotion_gate(version(**faster(size_bytes=2000)), CHAMPION, FREE, "size")
    with pytest.raises(GateError, match="quality: bits per byte"):
        promotion_gate(version(**faster(quality_change=0.03)), CHAMPION, ConstraintsSpec(max_quality_loss=0.5), "quality")
    with pytest.raises(GateError, match="objective speedup@8: speedup_8 was not measured"):
        promotion_gate(version(**faster()), CHAMPION, FREE, "speedup@8")


# -- on a registry -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_promotion_records_its_gates_and_the_next_worse_one_changes_nothing(desk: Bench) -> None:
    first = register_winner(desk.registry, desk.winner("one", constraints={"min_speedup": 7.0}))
    done = gated_transition(desk.registry, MODEL, first.version, who="ada", why="first")
    assert (done.changed, done.version, done.stage) == (True, "1", "production")
    (entry,) = desk.registry.history(MODEL).transitions
    assert entry.gates == done.gates
    assert [gate.gate for gate in entry.gates] == ["min_speedup", "champion"]
    slow = METRICS | {"speedup_1": 7.2, "speedup_1_low": 7.1, "speedup_1_high": 7.3}
    second = register_winner(desk.registry, desk.winner("two", metrics=slow, constraints={"min_speedup": 7.0}))
    before = desk.state()
    with pytest.raises(GateError, match=r"refused to promote version 2 \(two\) of 'little-llama' over version 1 \(one\)"):
        gated_transition(desk.registry, MODEL, second.version, who="ada", why="second")
    assert desk.state() == before
    forced = gated_transition(desk.registry, MODEL, "2", who="ada", why="I know", force=True)
    (gate,) = desk.registry.history(MODEL).transitions[1].gates
    assert (forced.version, forced.stage, gate.gate, gate.passed) == ("2", "production", "forced", False)
    assert "speed 7.20x [7.10, 7.30] at batch 1 is worse" in gate.reason
    assert desk.registry.rollback(MODEL, "ada", "slow indeed").version == "1"


def test_the_gate_believes_no_tag(desk: Bench) -> None:
    slow = {name: value * 0.5 for name, value in METRICS.items() if name.startswith("speedup")}
    for name, metrics in (("one", METRICS), ("two", METRICS | slow)):
        register_winner(desk.registry, desk.winner(name, metrics=metrics, constraints={"max_size_bytes": 2000.0}))
    gated_transition(desk.registry, MODEL, "1", who="ada", why="first")
    client = desk.registry.client
    fast = METRICS | {"speedup_1": 999.0, "speedup_1_low": 999.0, "speedup_1_high": 999.0}
    client.set_model_version_tag(MODEL, "2", "featherweight.metrics", json.dumps(fast))
    client.set_model_version_tag(MODEL, "2", "featherweight.constraints", "{}")
    client.set_model_version_tag(MODEL, "2", "featherweight.objective", "size")
    with pytest.raises(GateError, match=r"objective speedup@1: speed 4\.00x .* is worse than the champion's 8\.00x"):
        gated_transition(desk.registry, MODEL, "2", who="eve", why="look how fast")


def test_without_verified_evidence_nothing_is_promoted_unless_it_is_forced(desk: Bench) -> None:
    winner = desk.winner()
    register_winner(desk.registry, winner)
    (measured,) = (node for node in LineageGraph.from_json(winner.lineage).nodes if node.stage == "evaluate")
    file = Path(str(local_path(measured.uri))) / "measurement.json"
    file.write_text(file.read_text().replace("8.0", "999.0"))
    said = r"evidence: no verified evaluation of version 1: artifact .*: file measurement.json is altered; re-evaluate it, or force"
    with pytest.raises(GatesRefused, match=said) as caught:
        gated_transition(desk.registry, MODEL, "1", who="eve", why="x")
    assert [(gate.gate, gate.passed) for gate in caught.value.gates] == [("evidence", False)]
    by_hand = {f"featherweight.{key}": value for key, value in {"metrics": '{"speedup_1": 999}', "digest": "d2"}.items()}
    desk.registry.client.create_model_version(MODEL, "featherweight:/nothing", tags=by_hand, await_creation_for=0)
    with pytest.raises(GatesRefused, match="no verified evaluation of version 2"):
        gated_transition(desk.registry, MODEL, "2", who="eve", why="x")
    assert desk.registry.champion(MODEL) is None
    gated_transition(desk.registry, MODEL, "1", who="ada", why="I know", force=True)
    (gate,) = desk.registry.history(MODEL).transitions[0].gates
    assert (gate.gate, gate.passed, "file measurement.json is altered" in gate.reason) == ("forced", False, True)


def test_same_artifact_as_the_champion_is_nothing_to_do(desk: Bench) -> None:
    winner = desk.winner()
    register_winner(desk.registry, winner)
    gated_transition(desk.registry, MODEL, "1", who="ada", why="first")
    before = desk.state()
    again = gated_transition(desk.registry, MODEL, register_winner(desk.registry, winner).version, who="ada", why="again")
    assert (again.changed, again.reason) == (False, "version 1 is in production already")
    assert desk.state() == before


@pytest.mark.parametrize("keys", [False, True])
def test_a_champion_that_was_altered_does_not_just_stay(desk: Bench, tmp_path: Path, monkeypatch, keys: bool) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_KEYS", str(tmp_path / "keys"))
    if keys:
        Keys.here().make()
    version = register_winner(desk.registry, desk.winner())
    gated_transition(desk.registry, MODEL, "1", who="ada", why="first")
    weights = Path(str(local_path(version.source))) / "artifacts" / "served" / "model.safetensors"
    weights.unlink()
    weights.write_bytes(b"other weights")
    before = desk.state()
    for force in (False, True):
        with pytest.raises(IntegrityError, match=r"version 1 is in production already, but not what was registered: .*altered"):
            gated_transition(desk.registry, MODEL, "1", who="ada", why="again", force=force)
    assert desk.state() == before
    assert gated_transition(desk.registry, MODEL, "1", "archived", who="ada", why="it was altered").changed


def test_staging_needs_no_gate(desk: Bench) -> None:
    register_winner(desk.registry, desk.winner(constraints={"min_speedup": 99.0}))
    done = gated_transition(desk.registry, MODEL, "1", "staging", who="ada", why="to try")
    assert (done.changed, done.gates, done.stage) == (True, (), "staging")
    before = desk.state()
    with pytest.raises(GateError, match=r"min_speedup: speed 8\.00x \[7\.50, 8\.50\] at batch 1, wanted 99\.0x"):
        gated_transition(desk.registry, MODEL, "challenger", who="ada", why="now")
    assert desk.state() == before


def test_winner_without_numbers_or_with_other_lineage_is_not_registered(desk: Bench) -> None:
    before = desk.state()
    with pytest.raises(GateError, match="variant one has no measurement"):
        register_winner(desk.registry, desk.winner("one", metrics={}))
    with pytest.raises(IntegrityError, match=r"the lineage is of .*, the winner two is 0000"):
        register_winner(desk.registry, desk.winner("two", digest="0" * 64))
    assert desk.state() == before


def promoted(
    desk: Bench, registration: Registration, stage: str, folder: Path, smoke: bool = False, approval: str = "none"
) -> Promotion:
    """The record of the promote stage after a registration."""
    for name in ("registered", "out"):
        (folder / name).mkdir(parents=True)
    (folder / "registered" / FILE).write_text(json.dumps(dataclasses.asdict(registration)))
    parent = ParentRun(Workspace(folder, desk.registry.tracking_uri), desk.experiment, desk.run_id)
    spec = PromoteSpec.model_validate({"model": MODEL, "stage": stage, "smoke": smoke, "approval": approval})
    metrics = promote(spec, registered=folder / "registered", parent=parent, out=folder / "out")
    record = Promotion.read(folder / "out")
    assert metrics["changed"] == record.changed
    assert metrics["gates_refused"] == sum(not gate.passed for gate in record.gates)
    return record


def test_the_stage_records_what_moved_what_refused_and_that_nothing_was_registered(desk: Bench, tmp_path: Path) -> None:
    slow = {name: value * 0.5 for name, value in METRICS.items() if name.startswith("speedup")}
    names = [desk.registry.register(desk.winner("a")), desk.registry.register(desk.winner("b", metrics=METRICS | slow))]
    first, second = (Registration(MODEL, one.variant, one.version, one.digest, one.uri, True, "best") for one in names)
    stays = promoted(desk, first, "none", tmp_path / "0")
    assert (stays.stage, stays.reason) == ("none", "registered as little-llama version 1, not promoted (promote.stage is none)")
    moved = promoted(desk, first, "production", tmp_path / "1")
    assert (moved.stage, moved.changed, [gate.gate for gate in moved.gates]) == ("production", True, ["champion"])
    again = promoted(desk, first, "production", tmp_path / "2")
    assert (again.changed, again.reason) == (
        False,
        "registered as little-llama version 1, in production (version 1 is in production already)",
    )
    refused = promoted(desk, second, "production", tmp_path / "3")
    assert (refused.version, refused.stage, refused.changed) == ("2", "none", False)
    assert "refused to promote version 2 (b)" in refused.reason
    (gate,) = (gate for gate in refused.gates if gate.gate == "objective speedup@1")
    assert (gate.passed, gate.value, gate.bound) == (False, 4.25, 7.5)
    nothing = promoted(desk, Registration(MODEL, reason="no variant was measured"), "production", tmp_path / "4")
    assert (nothing.version, nothing.changed, nothing.reason) == ("", False, "nothing registered: no variant was measured")
    assert desk.registry.champion(MODEL).version == "1"


def test_a_champion_that_does_not_answer_is_taken_back(desk: Bench, tmp_path: Path) -> None:
    """These artifacts hold no tokenizer."""
    small = METRICS | {"size_bytes": 500.0}
    first, second = (desk.registry.register(desk.winner(name, metrics=one)) for name, one in (("a", METRICS), ("b", small)))
    with pytest.raises(GatesRefused, match=r"version 1 \(a\) of .* was champion and taken back: .*it did not answer.*no champion"):
        gated_transition(desk.registry, MODEL, "1", who="ada", why="first", smoke=True)
    assert (desk.registry.champion(MODEL), desk.registry.get(MODEL, "1").stage) == (None, "archived")
    gated_transition(desk.registry, MODEL, first.version, who="ada", why="again")
    registration = Registration(MODEL, "b", second.version, second.digest, second.uri, True, "best")
    record = promoted(desk, registration, "production", tmp_path / "1", smoke=True)
    assert (record.stage, record.changed, record.unserved.startswith("it did not answer")) == ("archived", False, True)
    assert "; version 1 is champion" in record.reason
    last = desk.registry.history(MODEL).entries[-1]
    assert (last.action, last.after.champion, last.after.line, last.gates[0].gate) == ("rollback", "1", ("1",), "smoke")
    assert desk.registry.model(MODEL).behind() == []


def test_a_version_waits_for_a_person_and_who_and_why_are_kept(desk: Bench, tmp_path: Path) -> None:
    wanted = {"approval": "required"}
    found = desk.registry.register(desk.winner("a", promote=wanted, constraints={"min_speedup": 7.0}))
    registration = Registration(MODEL, "a", found.version, found.digest, found.uri, True, "best")
    record = promoted(desk, registration, "production", tmp_path / "1", approval="required")
    assert (record.stage, record.waits, record.changed) == ("staging", True, True)
    assert "waits for approval (featherweight approve little-llama/1 --why ...)" in record.reason
    assert [(gate.gate, gate.passed) for gate in record.gates] == [("min_speedup", True), ("champion", True)]
    with pytest.raises(GatesRefused, match=r"version 1 .* waits; its recipe wants a person's approval"):
        gated_transition(desk.registry, MODEL, "1", who="eve", why="quick")
    workspace = Workspace(tmp_path, desk.registry.tracking_uri)
    refused = approve_by_hand(workspace, MODEL, "too early", refuse=True)
    assert (refused.stage, desk.registry.history(MODEL).entries[-1].why) == ("none", "too early")
    again = promoted(desk, registration, "production", tmp_path / "2", approval="required")
    assert (again.stage, again.waits, "refused by" in again.reason, "too early" in again.reason) == ("none", False, True, True)
    done = approve_by_hand(workspace, f"{MODEL}/1", "tried it", refuse=False, smoke=False)
    assert (done.stage, done.gates[-1].gate, done.gates[-1].reason) == (
        "production",
        "approval",
        f"approved by {user_name()}: tried it",
    )
    assert desk.registry.history(MODEL).entries[-1].gates == done.gates
    with pytest.raises(GateError, match="version 1 of 'little-llama' is in production already; roll back instead"):
        approve_by_hand(workspace, MODEL + "/1", "oh", refuse=True)


def test_a_gate_that_refuses_lets_nothing_wait(desk: Bench, tmp_path: Path) -> None:
    found = desk.registry.register(desk.winner("a", promote={"approval": "required"}, constraints={"min_speedup": 99.0}))
    registration = Registration(MODEL, "a", found.version, found.digest, found.uri, True, "best")
    record = promoted(desk, registration, "production", tmp_path / "1", approval="required")
    assert (record.stage, record.waits, "min_speedup" in record.reason) == ("none", False, True)


def test_a_refusal_carries_its_gates_through_a_pickle() -> None:
    with pytest.raises(GatesRefused) as caught:
        promotion_gate(version(speedup_1=1.0, speedup_1_low=0.9, speedup_1_high=1.1), CHAMPION, FREE)
    sent = pickle.loads(pickle.dumps(caught.value))
    assert (str(sent), sent.gates) == (str(caught.value), caught.value.gates)
