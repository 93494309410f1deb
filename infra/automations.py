"""What a Prefect server watches over for a team: `python infra/automations.py [BLOCK]`, again at will.

Runs that send no sign of life are told to be crashed, at once rather than at the next look. With BLOCK, such as
`slack-webhook/team` or any other of Prefect's notification blocks, a failed, crashed or quarantined optimization is told there.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

SILENCE = timedelta(seconds=120)
"""Four of the heartbeats that our processes send (featherweight.system.services)."""
RUNS = {"prefect.resource.id": "prefect.flow-run.*"}


def silent_runs() -> Any:
    """A run whose heartbeats stop, and that has not ended, has crashed."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    ends = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Crashed", "Cancelled")}
    trigger = EventTrigger(
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *ends},
        match=RUNS,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=SILENCE,
    )
    action = ChangeFlowRunState(state=StateType.CRASHED, message="its process sends no sign of life")
    return AutomationCore(name="featherweight: silent runs have crashed", trigger=trigger, actions=[action])


def notification(block: str) -> Any:
    """A message through a notification block for what did not go well."""
    from prefect.client.orchestration import get_client
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    kind, _, name = block.partition("/")
    document = get_client(sync_client=True).read_block_document_by_name(name, kind)
    events = {"prefect.flow-run.Failed", "prefect.flow-run.Crashed", "featherweight.arrival.quarantined"}
    trigger = EventTrigger(expect=events, posture=Posture.Reactive, threshold=1)
    words = "{{ event.event }}: {{ event.resource.name or event.resource.id }}\n{{ event.payload }}"
    action = SendNotification(block_document_id=document.id, subject="Featherweight", body=words)
    return AutomationCore(name="featherweight: notifications", trigger=trigger, actions=[action])


def put(automation: Any) -> None:
    """Create an automation, in the place of one of the same name."""
    from prefect.client.orchestration import get_client

    client: Any = get_client(sync_client=True)
    for old in client.read_automations_by_name(automation.name):
        client.delete_automation(old.id)
    client.create_automation(automation)
    print(f"{automation.name}: set")


def main() -> None:
    put(silent_runs())
    if len(sys.argv) > 1:
        put(notification(sys.argv[1]))


if __name__ == "__main__":
    main()
