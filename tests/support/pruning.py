"""What the tests of pruning share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from featherweight.pruning.spec import PruneSpec
from featherweight.text.model_inputs import inputs_and_labels
from tasks.prune import prune

SMALL: dict[str, Any] = {"samples": 3, "sequence": 12}


def pruned(spec: PruneSpec, source: Path, text: Path, out: Path, **options: Any) -> dict[str, float]:
    out.mkdir()
    return dict(prune(spec, checkpoint=source, calibration=text, out=out, **options))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_and_labels(model.config, ids)[0]).logits
