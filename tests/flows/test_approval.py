"""A winner that waits for a person: its flow run is suspended, and goes on with the answer."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from featherweight.report.result import OptimizationResult
from featherweight.store.workspace import Workspace
from featherweight.system.processes import held_port
from flows.by_hand import approve_by_hand
from tests.support.registering import MODEL, Bench, desk

pytestmark = [pytest.mark.slow, pytest.mark.server]

__all__ = ["desk"]


@pytest.mark.parametrize("way", ["page", "terminal"])
@pytest.mark.parametrize("approve", [True, False])
def test_a_suspended_run_goes_on_with_the_answer(named_prefect: None, desk: Bench, approve: bool, way: str) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.exceptions import Pause
    from prefect.flow_engine import run_flow
    from prefect.flow_runs import resume_flow_run

    from flows.approval import awaited

    begun, workspace = [], Workspace.at(desk.root)

    @flow(name="optimization", persist_result=True, result_serializer="json")
    def optimization() -> dict[str, Any]:
        begun.append(1)
        result = OptimizationResult("t", "size", None, (), waits=f"{MODEL}/1", registered="waits")
        return awaited(result, workspace, smoke=False).to_dict()

    deployment: Any = optimization.to_deployment(f"approval {approve} by {way}")
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(deployment.apply())
        desk.registry.register(desk.winner(promote={"approval": "required"}, flow_run_id=str(run.id)))
        desk.registry.transition(MODEL, "1", "staging", who="ada", why="it waits")
        with pytest.raises(Pause):
            run_flow(optimization, flow_run=run, return_type="state")
        state: Any = client.read_flow_run(run.id).state
        assert (state.is_paused(), state.name) == (True, "Suspended")
        assert desk.registry.champion(MODEL) is None
        if way == "page":
            resume_flow_run(run.id, run_input={"approve": approve, "who": "ada", "why": "tried it"})
        else:
            done = approve_by_hand(workspace, f"{MODEL}/1", "tried it", not approve, smoke=False)
            assert done.reason.endswith("; its flow run goes on")
            entries = desk.registry.history(MODEL).entries
        again: Any = run_flow(optimization, flow_run=client.read_flow_run(run.id), return_type="state")
    told, last = again.result(), desk.registry.history(MODEL).entries[-1]
    assert (again.is_completed(), len(begun), told["waits"]) == (True, 2, "")
    assert desk.registry.get(MODEL, "1").stage == ("production" if approve else "none")
    assert (last.gates[-1].gate, last.gates[-1].passed, "tried it" in last.gates[-1].reason) == ("approval", approve, True)
    if way == "page":
        assert last.who == "ada (on Prefect's page)"
    else:
        assert desk.registry.history(MODEL).entries == entries
        assert told["registered"] == f"models:/{MODEL}/1 is in {'production' if approve else 'none'}"


def test_a_decision_stands_where_prefect_is_away(desk: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    desk.registry.register(desk.winner(promote={"approval": "required"}, flow_run_id=str(uuid.uuid4())))
    desk.registry.transition(MODEL, "1", "staging", who="ada", why="it waits")
    with held_port() as port:
        nobody = f"http://127.0.0.1:{port}/api"
        monkeypatch.setenv("PREFECT_API_URL", nobody)
        with temporary_settings({PREFECT_API_URL: nobody, PREFECT_CLIENT_MAX_RETRIES: 0}):
            done = approve_by_hand(Workspace.at(desk.root), f"{MODEL}/1", "tried it", False, smoke=False)
    assert (done.stage, "Prefect could not let its flow run go on" in done.reason) == ("production", True)
