"""What is pruned, in every way, trains and is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featherweight.checkpoint import opening
from featherweight.pruning.interface import sample_blocks
from featherweight.pruning.spec import PruneSpec
from featherweight.training.losses import mean_loss
from featherweight.training.spec import FinetuneSpec
from tasks.export import export
from tasks.finetune import finetune
from tests.support.families import family_checkpoint
from tests.support.pruning import SMALL, pruned
from tests.support.serving_models import serving_spec


@pytest.mark.engine
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "global"},
        {"method": "depth", "layers": 1},
        {"method": "width", "criterion": "activation"},
        {"method": "attention", "kv_heads": 1},
    ],
)
def test_what_is_pruned_trains_and_is_served_by_ctranslate2(options: dict[str, Any], text: Path, tmp_path: Path) -> None:
    source = family_checkpoint("llama", tmp_path / "source")
    pruned(PruneSpec.of(**SMALL, **options), source, text, tmp_path / "out")
    (tmp_path / "trained").mkdir()
    (tmp_path / "served").mkdir()
    spec = FinetuneSpec(steps=8, sequence=12, learning_rate=3e-3)
    finetune(spec, checkpoint=tmp_path / "out", text=text, out=tmp_path / "trained")
    ids = sample_blocks(PruneSpec.of(**SMALL), source, text, 0)
    before, after = (mean_loss(opening.load_model(tmp_path / name), ids) for name in ("out", "trained"))
    assert after < before
    served = export(serving_spec(engine="ctranslate2"), checkpoint=tmp_path / "trained", calibration=text, out=tmp_path / "served")
    assert served["parity_max_abs"] < 1e-4
