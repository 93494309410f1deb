"""What was measured in a workspace before: how fast engines read, and what grids cost this very checkpoint.

Read from the results that lie in the workspace's own artifact folder, without MLflow, whose import takes longer than advice may.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from featherweight.report.result import MEASURED, OptimizationResult, VariantRow
from featherweight.system.device import CPU

RESULTS = "artifacts/*/artifacts/result.json"
LATEST = 20
NEAR = 4.0
"""How much larger or smaller a model may be, by the bytes that a token reads, so that its speed tells of this one's."""
Key = tuple[str, str, str | None, str]
"""Engine, what it computes in as a recipe says it, grid and device."""


@dataclass(frozen=True)
class Before:
    """speeds: (bytes of a token, bytes per second at batch 1) by key, the latest first. losses: of this checkpoint, by key."""

    speeds: Mapping[Key, list[tuple[float, float]]] = field(default_factory=dict)
    losses: Mapping[Key, float] = field(default_factory=dict)

    def speed(self, key: Key, bytes_per_token: float) -> float | None:
        """Bytes per second that an engine read of a model of about that size; None where that was not measured."""
        near = (speed for size, speed in self.speeds.get(key, ()) if 1 / NEAR < size / bytes_per_token < NEAR)
        return next(near, None)


def measured_before(workspace: Path, source: str, cpu: str) -> Before:
    """What the latest results of a workspace tell that were measured on a CPU of that model. source: the checkpoint asked about."""
    speeds: dict[Key, list[tuple[float, float]]] = {}
    losses: dict[Key, float] = {}
    for result in _results(workspace):
        if result.machine.get("CPU") != cpu:
            continue
        recipe = _recipe(result)
        ours = recipe.get("checkpoint", {}).get("source") == source
        for row in (row for row in result.variants if row.status in MEASURED):
            key = (row.engine, _computes(recipe, row), row.grid, row.device or CPU)
            if (found := _speed(row)) is not None:
                speeds.setdefault(key, []).append(found)
            if ours and not _changed(row) and "quality_change" in row.metrics:
                losses.setdefault(key, row.metrics["quality_change"])
    return Before(speeds, losses)


def _results(workspace: Path) -> Iterator[OptimizationResult]:
    """The latest first; one that cannot be read tells nothing."""
    files = sorted(workspace.glob(RESULTS), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[:LATEST]:
        with suppress(OSError, ValueError, KeyError, TypeError):
            yield OptimizationResult.from_dict(json.loads(path.read_text()))


def _recipe(result: OptimizationResult) -> dict[str, Any]:
    told: Any = yaml.safe_load(result.recipe) if result.recipe else None
    return told if isinstance(told, dict) else {}


def _computes(recipe: Mapping[str, Any], row: VariantRow) -> str:
    """What the engine of a variant computed in, by the recipe's own words; the baseline in float32."""
    stages = recipe.get("stages", {})
    served = {**stages.get("compile", {}), **stages.get("export", {})}.get(row.name.rpartition("/")[2], {})
    return computes(served) if row.status != "baseline" else "float32"


def computes(keys: Mapping[str, Any]) -> str:
    """Likewise, of the keys of a last stage."""
    return str(keys.get("compute_type") or keys.get("precision") or "")


def _speed(row: VariantRow) -> tuple[float, float] | None:
    """The bytes of a token, and those of a second at batch 1."""
    if {"tokens_per_s_1", "bytes_per_token"} <= row.metrics.keys():
        return row.metrics["bytes_per_token"], row.metrics["bytes_per_token"] * row.metrics["tokens_per_s_1"]
    return None


def _changed(row: VariantRow) -> bool:
    """Whether it was distilled or pruned, so that its loss is not its grid's: more than a quantization and an engine."""
    return row.name.count("/") > 1
