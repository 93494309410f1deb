"""New checkpoints: each complete one is optimized once, from a folder and from a real S3 server."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml

from featherweight.checkpoint import arrivals
from featherweight.errors import CheckpointError, GateError
from featherweight.store.workspace import Workspace
from featherweight.system.processes import process_name
from flows.watch_schedule import _deployment, not_ready, parameters_of
from tasks.claim_runs import ARRIVAL, PROCESS, ClaimRuns, require_own_run, tell
from tasks.claims import Patience
from tasks.stages import stage_named
from tests.support.paths import ROOT
from tests.support.waiting import name_of_ended, until


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The shortest recipe: one export, measured."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(30):
        (text / f"{number}.txt").write_text(" ".join(f"word{number * 40 + i} is followed by {i}." for i in range(40)))
    tree = {
        "name": "arrived",
        "checkpoint": {"source": "replaced-by-watch"},
        "data": {"source": str(text), "evaluation": 0.3, "calibration": 0.2},
        "stages": {"export": {"ct2": {"engine": "ctranslate2"}}},
        "workload": {
            "prompt_tokens": 4,
            "new_tokens": 8,
            "batch_sizes": [1],
            "rounds": 2,
            "windows": 4,
            "window_tokens": 32,
        },
        "promote": {"model": "arrived", "stage": "staging"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def look(source: object, recipe: Path, root: Path, **patience: float) -> list[dict]:
    """What `featherweight watch --once` does, without a server of its own."""
    from flows.watch import run_due, watch_flow

    told = parameters_of(str(source), recipe, (), root, "every", 0.05, Patience(**patience))
    _deployment(root).apply()
    return run_due(watch_flow(**told), told["deployment"])


def statuses(seen: list[dict]) -> dict[str, str]:
    """How each arrival stands, by the last part of its name."""
    return {one["source"].rpartition("/")[2]: one["status"] for one in seen}


@pytest.mark.engine
def test_a_checkpoint_on_s3_is_optimized_once(
    harness: Path, tiny_checkpoint: Path, s3_server, recipe: Path, tmp_path: Path
) -> None:
    source, root, place = f"s3://{s3_server.bucket}/checkpoints", tmp_path / "workspace", s3_server.folder / "checkpoints" / "one"
    place.mkdir(parents=True)
    for path in tiny_checkpoint.iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, place)
    assert statuses(look(source, recipe, root)) == {"one": "waiting"}
    shutil.copy(tiny_checkpoint / "model.safetensors", place)
    (started,) = look(source, recipe, root)
    assert started["status"] == "done", started
    assert started["winner"] in ("ct2", "baseline")
    (place / "optimizer.pt").write_bytes(b"moments")
    (place / "config.json").touch()
    assert statuses(look(source, recipe, root)) == {"one": "done"}
    (version,) = Workspace.at(root).client().search_model_versions("name='arrived'")
    assert version.tags["featherweight.stage"] == "staging"


def stand_in(recipe: str, overrides: list, source: str, workspace: str, tags: dict | None = None) -> dict[str, str]:
    """In the place of an optimization: what is called bad fails."""
    if "bad" in source:
        raise CheckpointError(f"{source} has no such model")
    return {"winner": "stand-in"}


def test_one_that_fails_costs_itself_only_and_is_quarantined(
    harness: Path, tiny_checkpoint: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import watch

    monkeypatch.setattr(watch.optimize_flow, "fn", stand_in)
    monkeypatch.setattr(watch, "require_store", lambda *_: None)
    drop, root = tmp_path / "drop", tmp_path / "workspace"
    for number, name in enumerate(("bad", "good", "nonsense")):
        shutil.copytree(tiny_checkpoint, drop / name)
        config = json.loads((drop / name / "config.json").read_text())
        (drop / name / "config.json").write_text(json.dumps({**config, "number": number}) if number < 2 else "[")
    impatient = {"tries": 2, "backoff_s": 0.0}
    first = look(drop, recipe, root, **impatient)
    assert statuses(first) == {"bad": "failed", "good": "done", "nonsense": "waiting"}
    assert next(one["error"] for one in first if "bad" in one["source"]).endswith("/bad has no such model")
    assert statuses(look(drop, recipe, root, **impatient))["bad"] == "failed"
    assert statuses(look(drop, recipe, root, **impatient)) == {"bad": "quarantined", "good": "done", "nonsense": "waiting"}
    (waiting,) = not_ready(arrivals.look(str(drop), root / "arrivals", 0.05))
    assert waiting["source"].endswith("nonsense") and waiting["status"] == "waiting" and waiting["reason"]
    claims = ClaimRuns("").claims(Patience(**impatient), "arrived").values()
    (quarantined,) = [one for one in claims if one.count("FAILED")]
    told = quarantined.to_dict(Patience(**impatient))
    assert (told["status"], told["tries"]) == ("quarantined", 2) and "no such model" in told["reason"]
    assert statuses(look(drop, recipe, root, tries=3, backoff_s=0.0))["bad"] == "failed"  # a further try was granted


def test_what_died_is_taken_up_again(harness: Path, tiny_checkpoint: Path, recipe: Path, tmp_path: Path, monkeypatch) -> None:
    """Whoever began it is gone: known at once on this machine, by its silence where nobody here can know."""
    from prefect.states import Pending, Running

    from flows import watch

    monkeypatch.setattr(watch.optimize_flow, "fn", stand_in)
    monkeypatch.setattr(watch, "require_store", lambda *_: None)
    shutil.copytree(tiny_checkpoint, tmp_path / "drop" / "one")
    told = parameters_of(str(tmp_path / "drop"), recipe, (), tmp_path / "workspace", "every", 0.05, Patience(backoff_s=0.0))
    _deployment(tmp_path / "workspace").apply()
    (claimed,) = watch.watch_flow(**told)
    runs = ClaimRuns("")
    for state in (Pending(), Running()):
        runs.client.set_flow_run_state(claimed["flow_run"], state)
    here = process_name()
    for process, patience, status in (
        (here, {}, "running"),
        (f"elsewhere-{here}", {"silent_s": 1000.0}, "running"),
        (f"elsewhere-{here}", {"silent_s": 0.0}, "crashed"),
    ):
        runs.client.update_flow_run_labels(UUID(claimed["flow_run"]), {PROCESS: process})
        (claim,) = [one for one in runs.claims(Patience(**patience)).values() if one.key == claimed["key"]]
        assert claim.status(Patience()) == status
    deployment = runs.client.read_deployment_by_name(told["deployment"]).id
    by_hand = {"parameters": {"recipe": str(recipe)}, "tags": [ARRIVAL, "recipe arrived"]}
    runs.client.create_flow_run_from_deployment(deployment, **by_hand)
    again = look(tmp_path / "drop", recipe, tmp_path / "workspace", backoff_s=0.0)
    assert [(one["status"], one["tries"]) for one in again] == [("done", 2)]
    runs.client.update_flow_run_labels(UUID(again[0]["flow_run"]), {PROCESS: name_of_ended()})
    assert statuses(look(tmp_path / "drop", recipe, tmp_path / "workspace")) == {"one": "done"}


def test_the_slot_of_a_look_that_died_is_free_at_once(harness: Path) -> None:
    """The next ones would be cancelled until its lease has run out."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.states import Pending, Running

    from flows.watch import watch_flow

    alone = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    parameters = {"source": "nowhere", "recipe": "recipe.yaml"}
    made: Any = watch_flow.to_deployment("freed", parameters=parameters, concurrency_limit=alone)
    deployment, runs = made.apply(), ClaimRuns("watch/freed")

    def begun() -> tuple[UUID, str]:
        run = runs.client.create_flow_run_from_deployment(deployment)
        told: Any = runs.client.set_flow_run_state(run.id, Pending())
        return run.id, told.state.type.value

    first, state = begun()
    runs.client.set_flow_run_state(first, Running())
    assert (state, begun()[1]) == ("PENDING", "CANCELLED")
    runs.client.update_flow_run_labels(first, {PROCESS: process_name()})
    assert runs.free_dead() == 0 and begun()[1] == "CANCELLED"
    runs.client.update_flow_run_labels(first, {PROCESS: name_of_ended()})
    assert runs.free_dead() == 1 and begun()[1] == "PENDING"


def test_who_was_taken_for_dead_decides_nothing(harness: Path) -> None:
    from prefect import flow
    from prefect.context import FlowRunContext
    from prefect.states import Crashed

    from tasks.run_node import run_node

    @flow
    def late() -> str:
        context, runs = FlowRunContext.get(), ClaimRuns("")
        assert context and context.flow_run
        require_own_run()
        runs.client.set_flow_run_state(context.flow_run.id, Crashed(message="its process sends no sign of life"), force=True)
        with pytest.raises(GateError, match=r"Crashed at Prefect \(its process sends no sign of life\)"):
            run_node(stage_named("register"), None, {}, None)  # type: ignore[arg-type]
        return "refused"

    assert late() == "refused"


def test_a_teams_automations_are_set_once(harness: Path) -> None:
    """Set twice, each is there once: silent runs are told to be crashed; what goes wrong is told through a block."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.client.orchestration import get_client

    from infra.automations import notification, put, silent_runs

    block: Any = CustomWebhookNotificationBlock(name="team", url="http://127.0.0.1:9", json_data={"text": "{{body}}"})
    block.save("team", overwrite=True)
    for _ in range(2):
        put(silent_runs())
        put(notification("custom-webhook/team"))
    set_here = [one for one in get_client(sync_client=True).read_automations() if one.name.startswith("featherweight:")]
    found = {one.name: one for one in set_here}
    assert len(found) == len(set_here) == 2
    assert found["featherweight: silent runs have crashed"].trigger.within.total_seconds() == 120
    assert "featherweight.arrival.quarantined" in found["featherweight: notifications"].trigger.expect


def test_a_written_checkpoint_starts_a_look_and_what_fails_is_told(harness: Path) -> None:
    """The trigger of infra/prefect.yaml and the notifications of infra/automations.py, fired on a real Prefect server."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
    from prefect.events import emit_event
    from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
    from prefect.states import Failed

    from flows.watch import watch_flow
    from infra.automations import notification, put
    from tasks.claims import Claim

    deployed = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text())["deployments"]
    (trigger,) = next(one["triggers"] for one in deployed if one["name"] == "watch")
    parameters = {"source": "s3://bucket/checkpoints", "recipe": "recipe.yaml"}
    triggers = [DeploymentEventTrigger.model_validate(trigger)]
    made: Any = watch_flow.to_deployment("fired", parameters=parameters, triggers=triggers)
    deployment, runs = made.apply(), ClaimRuns("")
    with receiver() as (url, told):
        block: Any = CustomWebhookNotificationBlock(name="fired", url=url, json_data={"text": "{{body}}"})
        block.save("fired", overwrite=True)
        put(notification("custom-webhook/fired"))
        emit_event("featherweight.checkpoint.written", resource={"prefect.resource.id": "s3://bucket/checkpoints/step-1000"})
        only = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
        (run,) = until(lambda: runs.client.read_flow_runs(deployment_filter=only))
        assert run.state and run.state.is_scheduled() and run.created_by and run.created_by.type == "AUTOMATION"
        runs.client.set_flow_run_state(run.id, Failed(message="it holds no model"), force=True)
        tell("quarantined", Claim("a-key", "fired"), 3, "s3://bucket/checkpoints/bad")
        # Those of earlier tests may still come meanwhile: the server tells a moment later.
        for event, said in (
            ("prefect.flow-run.Failed", "it holds no model"),
            ("featherweight.arrival.quarantined", "checkpoints/bad"),
        ):
            until(lambda: any(event in text and said in text for text in told))  # noqa: B023 - it is called here and now


@contextmanager
def receiver() -> Iterator[tuple[str, list[str]]]:
    """An HTTP server that a webhook is sent to: its address, and the texts that came."""
    came: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(204)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", came
    finally:
        server.shutdown()
        server.server_close()
