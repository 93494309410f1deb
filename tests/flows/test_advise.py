"""`advise`, and `plan` without a recipe, on folders of which nothing but headers is read."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from featherweight.checkpoint.quantized_formats import grid_told
from featherweight.errors import CheckpointError, RecipeError
from featherweight.recipe.advice.asking import capability_of, facts_named, source_named
from featherweight.recipe.advice.measured import measured_before
from featherweight.report.result import OptimizationResult, VariantRow
from featherweight.spec import seconds_of
from flows.advise import share_of
from flows.cli import app
from tests.support.headers import CONFIG, headers_alone, of_a_llama, safetensors

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}

PARAMETERS = sum(prod(shape) for shape in of_a_llama(CONFIG).values())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return headers_alone(tmp_path_factory.mktemp("tiny"))


def told(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.slow
def test_advice_and_a_plan_of_a_folder_without_a_recipe(checkpoint: Path, tmp_path: Path) -> None:
    advice = told("advise", str(checkpoint), "--device", "cpu", "--workspace", str(tmp_path / "none"))
    assert advice["parameters"] == PARAMETERS and advice["workload"]["prompt_tokens"] == 64
    assert advice["ctranslate2_or_vllm"]["engine"] == "ctranslate2" and advice["recommended"]["refused"] is None
    away = told(
        "advise",
        str(checkpoint),
        "--gpus",
        "1",
        "--gpu-memory",
        "24",
        "--compute-capability",
        "8.9",
        "--concurrency",
        "16",
        "--device",
        "cuda",
    )
    assert (away["device"], away["speeds_from"], away["ctranslate2_or_vllm"]["engine"]) == ("cuda", "data sheet of L4", "vllm")
    plan = told("plan", str(checkpoint), "--workspace", str(tmp_path / "none"), "--budget", "1h", "--set", "device=cpu")
    served = {name.rpartition("/")[2] for name in plan["variants"]}
    assert served & {"ctranslate2-int8", "ctranslate2-float32"}  # int8 where the CPU sums its products exactly
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_an_adapter_is_its_base_and_somebody_elses_integers_stay(checkpoint: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(checkpoint), "peft_type": "LORA", "r": 2, "target_modules": ["up_proj"]})
    )
    modules = [f"layers.{layer}.mlp.up_proj" for layer in (0, 1)]
    factors = {"lora_A.weight": (2, 64), "lora_B.weight": (96, 2)}
    named = {f"base_model.model.model.{module}.{part}": shape for module in modules for part, shape in factors.items()}
    safetensors(adapter / "adapter_model.safetensors", named)
    assert facts_named(str(adapter)).parameters == PARAMETERS
    packed = tmp_path / "gptq"
    packed.mkdir()
    (packed / "tokenizer.json").write_text("{}")
    parts = {"qweight": (8, 96), "qzeros": (1, 12), "scales": (1, 96)}
    tensors = {f"model.{module}.{part}": shape for module in modules for part, shape in parts.items()}
    plain = {name: shape for name, shape in of_a_llama(CONFIG).items() if "up_proj" not in name}
    safetensors(packed / "model.safetensors", plain | tensors)
    (packed / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": GPTQ}))
    kept = facts_named(str(packed)).kept_grids
    assert kept is not None and kept[0].name == "int4-g128"
    assert grid_told("gptq", GPTQ | {"desc_act": True}) is None and grid_told("awq", {"bits": 4}) is None
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    found = grid_told("compressed-tensors", {"config_groups": {"group_0": {"weights": weights}}})
    assert found is not None and found.name == "fp8"


def test_what_a_workspace_measured_is_found_by_engine_and_grid(tmp_path: Path) -> None:
    metrics = {"tokens_per_s_1": 100.0, "bytes_per_token": 5e6, "quality_change": 0.004}
    rows = (VariantRow("rtn8/fast", "ctranslate2", "winner", "int8", metrics=metrics, device="cpu"),)
    recipe = "checkpoint: {source: here}\nstages: {export: {fast: {engine: ctranslate2, compute_type: int8}}}\n"
    result = OptimizationResult("t", "speedup@1", "rtn8/fast", rows, machine={"CPU": "some"}, recipe=recipe)
    place = tmp_path / "artifacts" / "run" / "artifacts"
    place.mkdir(parents=True)
    (place / "result.json").write_text(json.dumps(result.to_dict()))
    key = ("ctranslate2", "int8", "int8", "cpu")
    before = measured_before(tmp_path, "here", "some")
    assert (before.speed(key, 4e6), before.speed(key, 4e7), before.losses[key]) == (5e8, None, 0.004)
    assert measured_before(tmp_path, "elsewhere", "some").losses == {}
    assert asdict(measured_before(tmp_path, "here", "other")) == {"speeds": {}, "losses": {}}


def test_what_a_user_writes(tmp_path: Path) -> None:
    assert [seconds_of(text) for text in ("90", "90s", "10m", "1.5 h")] == [90, 90, 600, 5400]
    assert [share_of(text) for text in ("1%", "0.5 %", "0.02", "none")] == [0.01, 0.005, 0.02, None]
    assert (capability_of("9.0"), capability_of("12"), capability_of(None)) == ((9, 0), (12, 0), None)
    assert source_named("org/name") == "hf:org/name" and source_named("s3://b/p") == "s3://b/p"
    assert source_named(str(tmp_path)) == str(tmp_path)
    for wrong, refused in (
        *((seconds_of, "soon"), (share_of, "little"), (capability_of, "new")),
        *((share_of, wrong) for wrong in ("-1%", "nan", "inf", "1%%")),
    ):
        with pytest.raises(RecipeError, match=refused):
            wrong(refused)
    with pytest.raises(CheckpointError, match="is no folder or GGUF file here"):
        source_named("./nowhere")
