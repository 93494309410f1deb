"""What is written of a model whose weights stay in its files is byte for byte what is written of one in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from featherweight.checkpoint import streamed
from featherweight.runtimes import parity, writing
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.writing import write_served
from tests.conftest import STORY
from tests.support import serving_models as models
from tests.support.in_process import InProcess
from tests.support.serving_models import serving_spec

TOKENS = 64
OF_A_SAVE = ("architectures", "transformers_version", "use_cache")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_text(tmp_path_factory.mktemp("text"), STORY)


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "open_worker", InProcess)


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In shards: Qwen2 (biases, tied), Gemma (1 is added to its norms), GPT-2 (Conv1D) in bfloat16, Llama (untied) in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("models")
    kinds: dict[str, dict[str, Any]] = {
        "qwen2": {"tie_word_embeddings": True},
        "gemma": {"head_dim": 16},
        "gpt2": {"num_key_value_heads": 4},
        "llama": {"tie_word_embeddings": False, "dtype": torch.float32},
    }
    for kind, options in kinds.items():
        shutil.copytree(tiny_checkpoint, root / kind, ignore=shutil.ignore_patterns("model.safetensors"))
        dtype = options.pop("dtype", torch.bfloat16)
        config = AutoConfig.for_model(
            kind, vocab_size=320, max_position_embeddings=256, initializer_range=0.1, eos_token_id=1, **{**SIZES, **options}
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            for name, weight in model.named_parameters():
                if weight.ndim == 1:
                    weight.data.normal_(1.0 if "norm" in name and kind != "gemma" else 0.0, 0.1)
            model.save_pretrained(root / kind, max_shard_size="30KB")
    return {kind: root / kind for kind in kinds}


def both_ways(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A folder to write to with the model in memory, and one with its weights left in their files."""
    for name, large in {"whole": 2**40, "streamed": 1}.items():
        monkeypatch.setattr(streamed, "LARGE", large)
        (root / name).mkdir()
        yield name, root / name


@pytest.mark.engine
@pytest.mark.parametrize(
    ("kind", "engine", "options"),
    [
        ("qwen2", "ctranslate2", {"compute_type": "int8"}),
        ("gemma", "ctranslate2", {"compute_type": "float32"}),
        ("llama", "ctranslate2", {"compute_type": "int8_float32"}),
        ("qwen2", "onnxruntime-genai", {"precision": "int4"}),
        ("gemma", "onnxruntime-genai", {"precision": "int8"}),
        ("llama", "onnxruntime-genai", {"precision": "float32"}),
        ("qwen2", "llama.cpp", {"precision": "int8"}),
        ("llama", "llama.cpp", {"precision": "q4_k"}),
        ("gemma", "llama.cpp", {"precision": "float16"}),
        ("gpt2", "llama.cpp", {"precision": "q4_k"}),
    ],
)  # fmt: skip
def test_it_writes_the_same(
    kind: str,
    engine: str,
    options: dict[str, Any],
    checkpoints: dict[str, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if engine == "llama.cpp":
        pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    spec = serving_spec(engine, max_tokens=TOKENS, **options)
    found, metrics = {}, {}
    monkeypatch.setattr(writing, "PART_BYTES", 1)  # layer by layer
    for name, out in both_ways(tmp_path, monkeypatch):
        with torch.random.fork_rng():
            metrics[name] = write_served(spec, checkpoint=checkpoints[kind], calibration=text, out=out)
        found[name] = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert found["streamed"].keys() == found["whole"].keys()
    assert [path for path, content in found["whole"].items() if found["streamed"][path] != content] == []
    assert metrics["streamed"].keys() == metrics["whole"].keys()
    assert metrics["streamed"]["parity_max_abs"] == pytest.approx(metrics["whole"]["parity_max_abs"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "engine", "options"),
    [
        ("qwen2", "vllm", {"compute_type": "int8"}),
        ("gemma", "vllm", {"compute_type": "w4a16"}),
        ("llama", "vllm", {"compute_type": "float32", "kv_cache": "fp8"}),
        ("qwen2", "vllm", {"compute_type": "float16"}),
        ("llama", "torch", {"compute_type": "float16"}),
        ("qwen2", "torch", {"compute_type": "bfloat16"}),
    ],
)  # fmt: skip
def test_it_holds_the_same_tensors(
    kind: str,
    engine: str,
    options: dict[str, Any],
    checkpoints: dict[str, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In as many files as the checkpoint has, or in one; what is in them already is not written again."""
    for method in ("machine_refusal", "device_refusal", "model_refusal"):
        monkeypatch.setattr(type(RUNTIMES[engine]), method, lambda *_: None)
    monkeypatch.setattr(parity.Reference, "check", lambda reference, served: {"windows": sum(map(sum, reference.logprobs))})
    spec = serving_spec(engine, max_tokens=TOKENS, **options)
    found, metrics, configs = {}, {}, {}
    for name, out in both_ways(tmp_path, monkeypatch):
        metrics[name] = write_served(spec, checkpoint=checkpoints[kind], calibration=text, out=out)
        found[name] = {key: tensor for path in out.glob("*.safetensors") for key, tensor in load_file(path).items()}
        told = json.loads((out / "config.json").read_text())
        configs[name] = {key: value for key, value in told.items() if key not in OF_A_SAVE}
    assert found["streamed"].keys() == found["whole"].keys()
    for key, tensor in found["whole"].items():
        assert found["streamed"][key].dtype == tensor.dtype
        assert torch.equal(found["streamed"][key].float(), tensor.float())
    assert configs["streamed"] == configs["whole"]
    assert metrics["streamed"] == pytest.approx(metrics["whole"], rel=1e-4)
