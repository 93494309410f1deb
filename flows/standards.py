"""What a registered version is, in the forms that other tools read: CycloneDX, a model card, OpenLineage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from featherweight.errors import RecipeError
from featherweight.registry.lineage import Lineage


def write_standards(told: Lineage, bom: Path | None, card: Path | None, openlineage: str, licence: str) -> list[str]:
    """Write what is asked for, each held against its own library first; returns a line for each."""
    return list(_written(told, bom, card, openlineage, licence))


def _written(told: Lineage, bom: Path | None, card: Path | None, openlineage: str, licence: str) -> Iterator[str]:
    if bom is not None:
        from featherweight.registry.bom import bill_of_materials, require_valid

        bill = bill_of_materials(told, licence)
        require_valid(bill)
        yield _put(bom, json.dumps(bill, indent=1, ensure_ascii=False), "CycloneDX bill of materials")
    if card is not None:
        from featherweight.registry.card import model_card

        yield _put(card, model_card(told, licence), "model card")
    if openlineage:
        from featherweight.registry.openlineage import emit, graph_events

        yield f"OpenLineage: {emit(graph_events(told.graph), openlineage)} events to {openlineage}"


def _put(path: Path, text: str, what: str) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error.strerror or error}") from error
    return f"{what}: {path}"
