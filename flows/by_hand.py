"""Promotion and rollback by hand."""

from __future__ import annotations

from typing import get_args

from featherweight.errors import RecipeError
from featherweight.registry.history import StageName
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
    registry, who = Registry(workspace.tracking_uri), user_name()
    look(registry, model)
    if refuse:
        gone = registry.refuse(model, version, who, why)
        return Promotion.of(gone, True, f"approval refused by {who}: {why}")
    return gated_transition(registry, model, version, who=who, why=why, approved=True, smoke=smoke)


def roll_back_by_hand(workspace: Workspace, reference: str, why: str) -> Promotion:
    """Make the previous champion the champion again. Raises GateError where there is none."""
    model, _ = parse_reference(reference, "champion")
    registry = Registry(workspace.tracking_uri)
    look(registry, model)
    return Promotion.of(registry.rollback(model, user_name(), why), True, why)
