"""A person's approval within the optimization's flow: its run is suspended, and goes on once somebody answered on its page."""

from __future__ import annotations

from dataclasses import replace

from prefect.context import FlowRunContext
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput

from featherweight.registry.promotion import answered
from featherweight.registry.registry import Registry
from featherweight.registry.versions import parse_reference
from featherweight.report.result import OptimizationResult
from featherweight.store.workspace import Workspace
from flows.by_hand import decided


class Approval(RunInput):
    """The form on the page of a flow run that waits."""

    approve: bool = False
    who: str
    why: str


def awaited(result: OptimizationResult, workspace: Workspace, smoke: bool) -> OptimizationResult:
    """The result once a person has decided on a winner that waits, in a deployment's run; at once where nothing waits.

    The run is suspended: its process ends and its slot is free, and it begins anew, with what it made in the cache, when somebody
    resumes it. A run that a command line started ends instead, and `featherweight approve` decides.
    """
    context = FlowRunContext.get()
    if not result.waits or context is None or context.flow_run is None or context.flow_run.deployment_id is None:
        return result
    told = f"**{result.waits}** {result.headline()} Approve its promotion, with your name and why, or refuse it."
    answer = suspend_flow_run(wait_for_input=Approval.with_initial_data(description=told), key="approval")
    model, version = parse_reference(result.waits, "challenger")
    registry, who = Registry(workspace.tracking_uri), f"{answer.who} (on Prefect's page)"
    seen = registry.model(model)
    if answered(seen, version):  # by `featherweight approve`, which let this run go on
        return replace(result, registered=f"{seen.pick(version).uri} is in {seen.pick(version).stage}", waits="")
    done = decided(registry, model, version, who, answer.why, not answer.approve, smoke)
    return replace(result, registered=done.reason, waits="")
