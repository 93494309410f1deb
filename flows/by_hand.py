"""Promotion and rollback by hand."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import get_args
from uuid import UUID

from featherweight.errors import RecipeError, one_line
from featherweight.registry.history import StageName
from featherweight.registry.lineage import from_registry
from featherweight.registry.out_of_band import look
from featherweight.registry.promotion import Promotion, gated_transition
from featherweight.registry.registry import Registry
from featherweight.registry.versions import parse_reference
from featherweight.store.workspace import Workspace
from featherweight.system.user import user_name


def promote_by_hand(workspace: Workspace, reference: str, to: str, why: str, force: bool, smoke: bool = True) -> Promotion:
    """Move a version to a stage through its gates. Raises GateError with the reason where one refuses, or it does not answer."""
    if to not in get_args(StageName):
        raise RecipeError(f"unknown stage '{to}'; known: {', '.join(get_args(StageName))}")
    model, version = parse_reference(reference, "challenger")
    registry, who = Registry(workspace.tracking_uri), user_name()
    return gated_transition(registry, model, version, to, who=who, why=why, force=force, smoke=smoke)  # type: ignore[arg-type]


def approve_by_hand(workspace: Workspace, reference: str, why: str, refuse: bool, smoke: bool = True) -> Promotion:
    """A person approves a version, which is promoted through its other gates, or refuses it. Raises GateError where it stays."""
    model, version = parse_reference(reference, "challenger")
    registry = Registry(workspace.tracking_uri)
    done = decided(registry, model, version, user_name(), why, refuse, smoke)
    told = _let_go_on(registry, done, why)
    return replace(done, reason=f"{done.reason}; {told}") if told else done


def decided(registry: Registry, model: str, version: str, who: str, why: str, refuse: bool, smoke: bool) -> Promotion:
    """What a person decides about a version: it is promoted, or goes back to none. Raises GateError where another gate refuses."""
    look(registry, model)
    if refuse:
        gone = registry.refuse(model, version, who, why)
        return Promotion.of(gone, True, f"approval refused by {who}: {why}")
    return gated_transition(registry, model, version, who=who, why=why, approved=True, smoke=smoke)


def _let_go_on(registry: Registry, done: Promotion, why: str) -> str:
    """Resume the flow run that waits for this decision, where the environment names the Prefect server that has it; told in words.

    The decision stands whatever becomes of this.
    """
    flow_run = from_registry(registry, done.model, done.version).graph.flow_run_id
    if not flow_run or not os.environ.get("PREFECT_API_URL"):
        return ""
    from httpx import HTTPError
    from prefect.exceptions import FlowPauseTimeout, NotPausedError, ObjectNotFound
    from prefect.flow_runs import resume_flow_run

    answer = {"approve": done.stage == "production", "who": user_name(), "why": why}
    try:
        resume_flow_run(UUID(flow_run), run_input=answer)
    except (NotPausedError, ObjectNotFound, FlowPauseTimeout):  # it waits no more, or another server had it
        return ""
    except (HTTPError, RuntimeError) as error:  # Prefect raises the second where its server does not answer at all
        return f"Prefect could not let its flow run go on ({one_line(error, 200)}): resume it on its page"
    return "its flow run goes on"


def roll_back_by_hand(workspace: Workspace, reference: str, why: str) -> Promotion:
    """Make the previous champion the champion again. Raises GateError where there is none."""
    model, _ = parse_reference(reference, "champion")
    registry = Registry(workspace.tracking_uri)
    look(registry, model)
    return Promotion.of(registry.rollback(model, user_name(), why), True, why)
