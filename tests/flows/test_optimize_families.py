"""The main job for an encoder-decoder and for an encoder: through the command line, up to the champion that answers."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from featherweight.runtimes.catalog import RUNTIMES
from tests.support.command import command_here
from tests.support.families import PLAIN_WORDS, family_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.server, pytest.mark.slow, pytest.mark.usefixtures("named_prefect")]

RECIPE: dict[str, Any] = {
    "workload": {"prompt_tokens": 8, "new_tokens": 8, "batch_sizes": [1], "rounds": 2, "windows": 6, "window_tokens": 32},
    "constraints": {"max_quality_loss": 5.0},
    "objective": "speedup@1",
    "promote": {"model": "tiny", "stage": "production"},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "t5": {
        "task": "text2text-generation",
        "stages": {
            "quantize": {"rtn8": {"method": "rtn", "grid": "int8-reduced", "head": "int8-reduced", "sequence": 16}},
            "export": {"ct2": {"engine": "ctranslate2"}, "ct2-int8": {"engine": "ctranslate2", "compute_type": "int8"}},
            "compile": {"genai": {"engine": "onnxruntime-genai"}},
        },
        "variants": [{"serve": ["ct2", "genai"]}, {"quantize": "rtn8", "serve": "ct2-int8"}],
    },
    "bert": {
        "task": "fill-mask",
        "stages": {
            "quantize": {"rtn8": {"method": "rtn", "head": None, "sequence": 16}},
            "export": {"dynamic": {"engine": "torch-dynamic"}, "ct2": {"engine": "ctranslate2"}},
            "compile": {"inductor": {"engine": "torch-compile"}},
        },
        "variants": [{"serve": ["inductor", "ct2"]}, {"quantize": "rtn8", "serve": "dynamic"}],
    },
}
MEASURED = {"t5": {"baseline", "ct2", "rtn8/ct2-int8"}, "bert": {"baseline", "inductor", "rtn8/dynamic"}}
RULED_OUT = {"t5": "genai", "bert": "ct2"}


def write_pairs(path: Path) -> None:
    """Sentences, each with its words in the other order."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(PLAIN_WORDS, k=24)) for _ in range(60)]
    lines = [json.dumps({"text": text, "turned": " ".join(reversed(text.split()))}) for text in texts]
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_a_family_goes_through_every_stage_and_its_champion_answers(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "bert" and (reason := RUNTIMES["torch-compile"].missing()):
        pytest.skip(reason)
    family_checkpoint(kind, tmp_path / "checkpoint", **({"initializer_factor": 0.7} if kind == "t5" else {}))
    write_pairs(tmp_path / "pairs.jsonl")
    data = {"source": "pairs.jsonl", "evaluation": 0.2, "calibration": 0.2} | ({"target": "turned"} if kind == "t5" else {})
    tree = RECIPE | FAMILIES[kind] | {"name": kind, "checkpoint": {"source": "checkpoint"}, "data": data}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    done = command_here("optimize", "recipe.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["variants"]}
    measured = {name for name, row in rows.items() if row["status"] in ("winner", "loser", "baseline")}
    assert measured == MEASURED[kind], {name: row["reason"] for name, row in rows.items()}
    assert rows[RULED_OUT[kind]]["status"] == "ruled-out"
    plain = rows["ct2" if kind == "t5" else "inductor"]["metrics"]
    assert abs(plain["quality_change"]) < 1e-4 and plain["parity"] < 1e-3
    assert all(rows[name]["metrics"]["tokens_per_s_1"] > 0 for name in measured)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / '.featherweight' / 'mlflow.db'}")
    check_champion(kind)


def check_champion(kind: str) -> None:
    """It translates, or fills the mask and leaves the rest as it is."""
    import mlflow

    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    try:
        champion = mlflow.pyfunc.load_model("models:/tiny@champion")
        answers = list(champion.predict(["the little fox", "the <mask> fox"], params={"stop_at_end": False}))
    finally:
        mlflow.set_tracking_uri(None)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    if kind == "bert":
        assert answers[0] == "the little fox"
        assert answers[1].startswith("the ") and answers[1].endswith(" fox") and "<mask>" not in answers[1]
