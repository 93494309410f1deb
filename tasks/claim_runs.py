"""Claims in Prefect: an arrival's optimization is a flow run that is made once, found when it is dead, and made again."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from featherweight.errors import GateError, ServiceError, one_line
from featherweight.masking import masked
from featherweight.system.processes import end_with_parent_where_told, is_running, process_name
from tasks.claims import Claim, Patience, Try, is_lost

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

ARRIVAL = "featherweight arrival"
PROCESS = "featherweight.process"
_PAGE = 200
_PREFIX = re.compile(r"Flow run encountered an exception:? *")


class ClaimRuns:
    """The flow runs of arrivals at the Prefect server that the environment names; new ones are made of `deployment`."""

    def __init__(self, deployment: str) -> None:
        from prefect.client.orchestration import get_client
        from prefect.exceptions import ObjectNotFound

        self.client: SyncPrefectClient = get_client(sync_client=True)
        try:
            self._deployment = self.client.read_deployment_by_name(deployment).id if deployment else None
        except ObjectNotFound as error:
            raise ServiceError(f"Prefect has no deployment '{deployment}'; deploy infra/prefect.yaml, or name another") from error

    def claims(self, patience: Patience, recipe: str | None = None) -> dict[str, Claim]:
        """Every claim by its key, of one recipe or of all; runs that lost their process are told to be crashed on the way."""
        found: dict[str, list[Try]] = {}
        names: dict[str, str] = {}
        for run in self._runs([ARRIVAL, *([_tag(recipe)] if recipe else [])]):
            key, _, number = str(run.idempotency_key).rpartition("/")
            if not number.isdigit():  # a copy that somebody made by hand
                continue
            found.setdefault(key, []).append(self._crashed_where_lost(_try(run, int(number)), patience))
            names[key] = next((tag.partition(" ")[2] for tag in run.tags if tag.startswith(_tag(""))), "")
        return {key: Claim(key, names[key], tuple(sorted(tries, key=lambda one: one.number))) for key, tries in found.items()}

    def make(self, claim: Claim, number: int, at: datetime, parameters: dict[str, Any]) -> Claim:
        """The claim with its next try, which this or another watcher made."""
        from prefect.states import Scheduled

        if self._deployment is None:
            raise ValueError("no deployment to make a flow run of")
        run = self.client.create_flow_run_from_deployment(
            self._deployment,
            parameters=parameters,
            state=Scheduled(scheduled_time=at),
            tags=[ARRIVAL, _tag(claim.recipe)],
            idempotency_key=f"{claim.key}/{number}",
        )
        tell("claimed", claim, number, str(parameters.get("source", "")))
        return replace(claim, tries=(*claim.tries, _try(run, number)))

    def begin(self, run_id: str) -> FlowRun | None:
        """The flow run, ready to be run by this process; None where another one has begun it, or no slot is free.

        Of several that propose Pending at once Prefect lets one; it lets none leave Completed, because the result is persisted.
        """
        from prefect.states import Pending

        before = self.client.read_flow_run(uuid.UUID(run_id)).state
        if before is None or not before.is_scheduled():
            return None
        answer: Any = self.client.set_flow_run_state(run_id, Pending())
        if answer.state is None or not answer.state.is_pending() or answer.status.value != "ACCEPT":
            return None
        sign(self.client, run_id)
        return self.client.read_flow_run(uuid.UUID(run_id))

    def free_dead(self) -> int:
        """Tell Prefect that the deployment's runs whose process on this machine is gone have crashed, which frees their slots."""
        from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowRunFilter, FlowRunFilterState
        from prefect.client.schemas.filters import FlowRunFilterStateType as Types
        from prefect.client.schemas.objects import StateType
        from prefect.states import Crashed

        begun = FlowRunFilter(state=FlowRunFilterState(type=Types(any_=[StateType.PENDING, StateType.RUNNING])))
        own = DeploymentFilter(id=DeploymentFilterId(any_=[self._deployment])) if self._deployment else None
        found = self.client.read_flow_runs(flow_run_filter=begun, deployment_filter=own) if own else []
        dead = [run for run in found if PROCESS in run.labels and is_running(str(run.labels[PROCESS])) is False]
        for run in dead:
            self.client.set_flow_run_state(run.id, Crashed(message="its process is gone"))
        return len(dead)

    def _runs(self, tags: Sequence[str]) -> Iterator[FlowRun]:
        """One that slips from one page to another while it is read is not lost: who asks for it anew is given it."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
        from prefect.client.schemas.sorting import FlowRunSort

        wanted, offset = FlowRunFilter(tags=FlowRunFilterTags(all_=list(tags))), 0
        while True:
            page = self.client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.ID_DESC, limit=_PAGE, offset=offset)
            yield from page
            offset += len(page)
            if len(page) < _PAGE:
                return

    def _crashed_where_lost(self, last: Try, patience: Patience) -> Try:
        """Tell Prefect that a run whose process is gone has crashed, which frees its slot too."""
        from prefect.states import Crashed

        if last.state not in ("PENDING", "RUNNING"):
            return last
        running = is_running(last.process) if last.process else None
        bearable = patience if patience.silent_s is not None else replace(patience, silent_s=_three_heartbeats())
        if not is_lost(last, bearable, running, self._heard(last) if running is None else last.since, _now()):
            return last
        reason = "its process is gone" if running is False else "its process sends no sign of life"
        self.client.set_flow_run_state(last.run_id, Crashed(message=reason))
        return _try(self.client.read_flow_run(uuid.UUID(last.run_id)), last.number)

    def _heard(self, last: Try) -> datetime:
        """When a run gave its last sign of life: an event of its own, else its state."""
        from prefect.events.filters import EventFilter, EventResourceFilter

        page = self.client.read_events(EventFilter(resource=EventResourceFilter(id=[f"prefect.flow-run.{last.run_id}"])), limit=1)
        return max([last.since, *(event.occurred for event in page.events)])


def sign(client: SyncPrefectClient, run_id: Any) -> None:
    """Note at a flow run which process runs it, so that others can tell when it is gone."""
    client.update_flow_run_labels(uuid.UUID(str(run_id)), {PROCESS: process_name()})


def sign_own_run() -> None:
    """Note at this process's flow run, where it is a deployment's, that it is this one that runs it."""
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    if context and context.flow_run and context.flow_run.deployment_id:
        end_with_parent_where_told()
        sign(get_client(sync_client=True), context.flow_run.id)


def require_own_run() -> None:
    """Raise GateError where this process's flow run has ended without it: it was taken for dead, or somebody cancelled it.

    Who stood still for an hour (a laptop's sleep, SIGSTOP) and goes on finds another try in its place, which decides alone.
    """
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    state = get_client(sync_client=True).read_flow_run(context.flow_run.id).state
    if state is not None and state.is_final():
        raise GateError(
            f"this run is {state.name} at Prefect ({reason_of(state) or 'no reason given'}); it decides nothing any more"
        )


def tell(what: str, claim: Claim, number: int, source: str) -> None:
    """Emit an event of a claim, for automations; told twice it is one event."""
    from prefect.events import emit_event

    key = f"{claim.key}/{number}"
    emit_event(
        f"featherweight.arrival.{what}",
        resource={"prefect.resource.id": f"featherweight.arrival.{claim.key}", "prefect.resource.name": masked(source)},
        payload={"recipe": claim.recipe, "try": number, "reason": claim.last.reason if claim.last else ""},
        id=uuid.uuid5(uuid.NAMESPACE_URL, f"featherweight {what} {key}"),
    )


def reason_of(state: Any) -> str:
    """Why a run is in its state, in one line."""
    return one_line(_PREFIX.sub("", state.message or ""))


def _try(run: FlowRun, number: int) -> Try:
    state = run.state
    if state is None:
        raise ServiceError(f"Prefect's flow run {run.id} has no state; see its page")
    since = state.state_details.scheduled_time if state.is_scheduled() else None
    source = masked(run.parameters.get("source", ""))
    process = str(run.labels.get(PROCESS, ""))
    return Try(number, str(run.id), state.type.value, since or state.timestamp, reason_of(state), process, source)


def _tag(recipe: str) -> str:
    return f"recipe {recipe}"


def _three_heartbeats() -> float:
    from prefect.settings.context import get_current_settings

    return 3.0 * (get_current_settings().flows.heartbeat_frequency or 180)


def _now() -> datetime:
    return datetime.now(UTC)
