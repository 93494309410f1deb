"""What was measured in a workspace before: how near engines came to the roof, and what grids cost this very checkpoint.

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

RESULTS = "artifacts/*/artifacts/result.json"
LATEST = 20
NEAR = 4.0
"""How much larger or smaller a model may be, by the bytes that a token reads, so that its share of the roof tells of this one's."""
Key = tuple[str, str | None, str]
"""Engine, grid and device."""


@dataclass(frozen=True)
class Before:
    """shares: (bytes read for a token, share of the bandwidth) by key, the latest first. losses: of this checkpoint, by key."""

    shares: Mapping[Key, list[tuple[float, float]]] = field(default_factory=dict)
    losses: Mapping[Key, float] = field(default_factory=dict)

    def share(self, key: Key, bytes_per_token: float) -> float | None:
        """The share that an engine reached on a model of about that size; None where that was not measured."""
        near = (share for size, share in self.shares.get(key, ()) if 1 / NEAR < size / bytes_per_token < NEAR)
        return next(near, None)


def measured_before(workspace: Path, source: str, cpu: str) -> Before:
    """What the latest results of a workspace tell that were measured on a CPU of that model. source: the checkpoint asked about."""
    shares: dict[Key, list[tuple[float, float]]] = {}
    losses: dict[Key, float] = {}
    for result in _results(workspace):
        if result.machine.get("CPU") != cpu:
            continue
        ours = _source(result) == source
        for row in (row for row in result.variants if row.status in MEASURED):
            key = (row.engine, row.grid, row.device or "cpu")
            if (found := _share(row)) is not None:
                shares.setdefault(key, []).append(found)
            if ours and not _changed(row) and "quality_change" in row.metrics:
                losses.setdefault(key, row.metrics["quality_change"])
    return Before(shares, losses)


def _results(workspace: Path) -> Iterator[OptimizationResult]:
    """The latest first; one that cannot be read tells nothing."""
    files = sorted(workspace.glob(RESULTS), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[:LATEST]:
        with suppress(OSError, ValueError, KeyError, TypeError):
            yield OptimizationResult.from_dict(json.loads(path.read_text()))


def _source(result: OptimizationResult) -> str | None:
    told: Any = yaml.safe_load(result.recipe) if result.recipe else None
    return told["checkpoint"].get("source") if isinstance(told, dict) and isinstance(told.get("checkpoint"), dict) else None


def _share(row: VariantRow) -> tuple[float, float] | None:
    """Of the bandwidth, at batch 1."""
    if {"roofline_1", "bytes_per_token"} <= row.metrics.keys():
        return row.metrics["bytes_per_token"], row.metrics["roofline_1"]
    return None


def _changed(row: VariantRow) -> bool:
    """Whether it was distilled or pruned, so that its loss is not its grid's: more than a quantization and an engine."""
    return row.name.count("/") > 1
