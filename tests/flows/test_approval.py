"""A winner that waits for a person: its flow run is suspended, and goes on with the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featherweight.report.result import OptimizationResult
from featherweight.store.workspace import Workspace
from tests.support.registering import MODEL, Bench, desk

pytestmark = [pytest.mark.slow, pytest.mark.server]

__all__ = ["desk"]


@pytest.mark.parametrize("approve", [True, False])
def test_a_suspended_run_goes_on_with_the_answer(harness: Path, desk: Bench, approve: bool) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.exceptions import Pause
    from prefect.flow_engine import run_flow
    from prefect.flow_runs import resume_flow_run

    from flows.approval import awaited

    desk.registry.register(desk.winner(promote={"approval": "required"}))
    desk.registry.transition(MODEL, "1", "staging", who="ada", why="it waits")
    begun = []

    @flow(name="optimization", persist_result=True, result_serializer="json")
    def optimization() -> dict[str, Any]:
        begun.append(1)
        result = OptimizationResult("t", "size", None, (), waits=f"{MODEL}/1", registered="waits")
        return awaited(result, Workspace.at(desk.root), smoke=False).to_dict()

    deployment: Any = optimization.to_deployment(f"approval {approve}")
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(deployment.apply())
        with pytest.raises(Pause):
            run_flow(optimization, flow_run=run, return_type="state")
        state: Any = client.read_flow_run(run.id).state
        assert (state.is_paused(), state.name) == (True, "Suspended")
        assert desk.registry.champion(MODEL) is None
        resume_flow_run(run.id, run_input={"approve": approve, "who": "ada", "why": "tried it"})
        again: Any = run_flow(optimization, flow_run=client.read_flow_run(run.id), return_type="state")
    told, last = again.result(), desk.registry.history(MODEL).entries[-1]
    assert (again.is_completed(), len(begun), told["waits"], last.who) == (True, 2, "", "ada (on Prefect's page)")
    assert desk.registry.get(MODEL, "1").stage == ("production" if approve else "none")
    assert (last.gates[-1].gate, last.gates[-1].passed, "tried it" in last.gates[-1].reason) == ("approval", approve, True)
