"""AOTInductor: what is refused before anything is compiled, and that what it compiles answers as PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from featherweight.errors import StageError
from featherweight.grid import GRIDS
from featherweight.model.decoding import OWN_ATTENTION
from featherweight.model.facts import CheckpointFacts
from featherweight.runtimes.candidate import Candidate
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Grids, Limits
from featherweight.runtimes.torch_aoti import constants
from featherweight.runtimes.torch_aoti.loaded import require_torch
from featherweight.store.served_folder import Serving
from featherweight.system.machine import Machine, describe
from tests.support.compiling import LABELS, check_labels, check_texts, compiled, configuration
from tests.support.families import tiny_model
from tests.support.serving_models import serving_spec

AOTI = RUNTIMES["torch-aoti"]
SPEC = serving_spec(engine="torch-aoti")
ABSENT = AOTI.unwritable() or AOTI.machine_refusal(SPEC, describe())
WRAPPER = """\
    constants_info_[0].name = "model_up_weight";
    constants_info_[0].original_fqn = "model.up.weight";
    constants_info_[1].name = "constant1";
    constants_info_[1].original_fqn = "constant1";
    [[maybe_unused]] auto& model_up_weight = constants_->at(0);
    [[maybe_unused]] auto& constant1 = constants_->at(1);
    cpp_fused_mm_1((const float*)(buf1.data_ptr()), (const float*)(constant1.data_ptr()), s27);
"""


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"model_type": "llama"}, None),
        ({"model_type": "mistral", "sliding_window": 32}, None),
        ({"model_type": "mamba2"}, "a mamba2 model keeps no keys and values"),
        ({"model_type": "bamba", "layer_types": ["linear_attention", "full_attention"]}, "has layers of linear_attention"),
        ({"model_type": "bloom"}, "a bloom's is part of transformers' module; take another engine"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}},
            "depend on the length (dynamic); take another engine",
        ),
        ({"model_type": "phi3", "rope_parameters": {"rope_type": "longrope"}}, "depend on the length (longrope)"),
    ],
)
def test_models_that_no_graph_of_one_form_computes_are_refused(told: dict[str, Any], reason: str | None) -> None:
    found = AOTI.model_refusal(SPEC, Candidate(CheckpointFacts(configuration(**told)), 64))
    assert (found is None) if reason is None else reason in str(found)


def test_the_decoders_whose_attention_is_their_own_are_those() -> None:
    import inspect
    import sys

    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    for kind in ("llama", "gpt2", "opt", "gpt_oss", *OWN_ATTENTION):
        module = sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]].__module__]
        assert ("ALL_ATTENTION_FUNCTIONS" in inspect.getsource(module)) == (kind not in OWN_ATTENTION), kind


def test_it_serves_floats_of_decoders_and_encoders_from_x86_64() -> None:
    assert AOTI.grid_refusal(Grids(), SPEC) is None
    assert "would store rounded weights at full size" in str(AOTI.grid_refusal(Grids(GRIDS["int8"]), SPEC))
    assert "not of both in one" in str(AOTI.task_refusal("text2text-generation"))
    assert AOTI.task_refusal("text-generation") is None and AOTI.task_refusal("feature-extraction") is None
    assert "serves from the CPU alone" in str(AOTI.device_refusal(SPEC, "cuda", describe()))
    arm = Machine("Linux", "aarch64", "some", frozenset({"asimd", "sve"}), 2, 2, 2**33, ())
    assert "compiles for x86-64 with AVX2 or AVX-512 here" in str(AOTI.machine_refusal(SPEC, arm))


def test_without_a_compiler_it_serves_and_does_not_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert AOTI.missing() is None
    assert "needs a C++ compiler, and there is no no-such-compiler" in str(AOTI.unwritable())


def test_what_another_torch_compiled_is_not_loaded() -> None:
    require_torch("2.13.0+cpu", "2.13.0+cpu")
    with pytest.raises(StageError, match=r"torch 2\.13\.0\+cpu compiled this model, and torch 2\.14\.0 is here; install that one"):
        require_torch("2.13.0+cpu", "2.14.0")


def test_a_package_for_other_instructions_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"made_for": "x86-64-v4", "torch": "2.13.0"}))
    from featherweight.runtimes.torch_aoti import loaded

    avx2 = Machine("Linux", "x86_64", "some", frozenset({"avx2", "fma"}), 2, 2, 2**33, ())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loaded, "describe", lambda: avx2)
        with pytest.raises(StageError, match="compiled for x86-64-v4, and the CPU here has no avx512bw; optimize the model"):
            loaded.AotiModel(tmp_path, Serving("torch-aoti"), Limits(1))


def test_weights_are_kept_once_and_those_that_nothing_reads_not_at_all(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    assert constants.unread(WRAPPER) == {"model.up.weight"}
    whole, store = torch.arange(12.0).view(3, 4), {}
    given = {"table": whole, "turned": whole.t(), "packed": whole + 1, "gone": whole + 2, "one": torch.tensor(7)}
    views = constants.stored(given, {"gone"}, store)
    save_file(store, tmp_path / "weights.safetensors")
    found = constants.viewed(views, constants.read(tmp_path / "weights.safetensors"))
    assert len(store) == 3 and found.pop("gone").numel() == 0
    assert all(found[name].equal(given[name]) and found[name].stride() == given[name].stride() for name in found)


def test_what_a_step_reads_is_told_by_the_manifest(tmp_path: Path) -> None:
    views = {
        "model.embed.weight": {"key": "a", "shape": [10, 4], "stride": [4, 1]},
        "packed": {"key": "b", "shape": [2, 4, 8], "stride": [32, 8, 1]},
        "model.up.weight": None,
    }
    told = {"tables": ["model.embed.weight"], "constants": {"read": {}, "step": views}}
    (tmp_path / "manifest.json").write_text(json.dumps(told))
    held = {one.role: (one.size_bytes, one.rows) for one in AOTI.held_tensors(tmp_path, Serving("torch-aoti"), configuration())}
    assert held == {"row": (160, 10), "step": (256, 2)}


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
def test_a_decoder_writes_as_pytorch_across_the_parts_of_its_cache(tmp_path: Path) -> None:
    """Grouped heads, prompts of two lengths in one call, and texts that cross 64 places."""
    checkpoint, engine = compiled(serving_spec(engine="torch-aoti", max_tokens=96), "llama", tmp_path)
    packages = {path.name for path in (tmp_path / "out" / "aoti").iterdir()}
    assert packages == {"read.pt2", "step.pt2", "weights.safetensors", "manifest.json"}
    check_texts(checkpoint, engine, [[9, 8, 7] * 20, [12, 5, 9] * 20, [4, 5], [6]])


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
def test_an_encoder_answers_each_text_as_if_it_were_alone(tmp_path: Path) -> None:
    check_labels(*compiled(serving_spec(engine="torch-aoti", max_tokens=96), "bert", tmp_path, **LABELS))


WINDOW = 24
KINDS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"sliding_window": WINDOW, "num_local_experts": 4},
    "llama4_text": {"attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 48, "no_rope_layers": [1, 1]},
    "phimoe": {"sliding_window": WINDOW, "num_local_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "hrm_text": {"num_layers_per_stack": 1, "H_cycles": 2, "L_cycles": 1, "num_hidden_layers": 4},
    "afmoe": {"sliding_window": WINDOW, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
}
SIZED = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layer_sees_is_what_its_configuration_says(kind: str) -> None:
    """Windows that are told to the mask alone (Phi-3.5-MoE), chunks (Llama 4), sinks (gpt-oss), layers that are used
    again and again (HRM), and flags of routers, ignored."""
    import torch

    from featherweight.runtimes.torch_aoti.graph import Decoder, Step, layer_shapes

    model = tiny_model(kind, vocab_size=99, **SIZED | {"head_dim": 8} | KINDS[kind])
    texts, places = torch.randint(3, 99, (2, 40)), torch.arange(40)
    with torch.no_grad():
        whole, layers = model(texts, use_cache=False).logits, layer_shapes(model)
        keys = [torch.zeros(2, one.groups, 64, one.width) for one in layers]
        values = [torch.zeros(2, one.groups, 64, one.value_width) for one in layers]
        read = Decoder(model)(texts[:, :32], places[:32], places[:32], keys, values)
        steps = [Step(model)(texts[:, at : at + 1], places[at : at + 1], keys, values) for at in range(32, 40)]
    torch.testing.assert_close(torch.cat([read, *steps], dim=1), whole, atol=1e-4, rtol=1e-4)
