"""What asks for more than any model has is refused from its JSON and headers, within a second and next to no memory."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from featherweight.checkpoint.files import Listing
from featherweight.checkpoint.sanity import require_embedded, require_sane
from featherweight.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def rewritten(path: Path, *keys: str, value: Any) -> None:
    """One value of a JSON file changed, below these keys."""
    tree = json.loads(path.read_text())
    place = tree
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("file", "keys", "value", "message"),
    [
        ("config.json", ["num_hidden_layers"], 200_000, "num_hidden_layers is 200000, but the files hold 20 tensors"),
        ("config.json", ["encoder_layers"], 200_000, "encoder_layers is 200000"),
        ("config.json", ["text_config"], {"num_layers": 10**6}, "num_layers is 1000000"),
        ("config.json", ["hidden_size"], 10**18, "no model has so many"),
        ("config.json", ["rope_parameters", "rope_theta"], "10000", "rope_theta is '10000', and must be a number above 0"),
        ("config.json", ["rope_parameters"], {"full_attention": {"factor": 0}}, "factor is 0, and must be a number above 0"),
        ("config.json", ["rope_theta"], 0, "rope_theta is 0"),
        ("config.json", ["eos_token_id"], [0, 10**9], "eos_token_id is 1000000000"),
        ("generation_config.json", ["pad_token_id"], 10**9, "pad_token_id is 1000000000"),
        ("generation_config.json", ["eos_token_id"], [], r"generation_config.json: eos_token_id is \[\]"),
        ("generation_config.json", ["eos_token_id"], "1", "eos_token_id is '1', with which transformers' generate fails"),
        ("generation_config.json", ["forced_eos_token_id"], 10**6, "forced_eos_token_id is 1000000"),
        ("generation_config.json", ["repetition_penalty"], 2, "a number above 0 with a decimal point"),
        ("generation_config.json", ["bad_words_ids"], [[-1]], "bad_words_ids"),
        ("generation_config.json", ["bad_words_ids"], [[3], [320]], "it takes lists of ids below 320, one at least"),
        ("generation_config.json", ["sequence_bias"], [[[3], 1]], "sequence_bias is .* and a number with a decimal point"),
        ("generation_config.json", ["sequence_bias"], {"3": 1.0}, "sequence_bias"),
        ("generation_config.json", ["exponential_decay_length_penalty"], 1.5, "it takes a place and a factor"),
        ("generation_config.json", ["stop_strings"], [], "stop_strings"),
        ("generation_config.json", ["num_beams"], 0, "num_beams is 0"),
        ("generation_config.json", ["pad_token_id"], [0], r"pad_token_id is \[0\]"),
        (
            "config.json",
            ["transformers_weights"],
            "other.safetensors",
            r"\(transformers_weights\); call that file model.safetensors",
        ),
        ("tokenizer.json", ["model", "vocab", "far"], 10**9, "tokenizer.json has the token id 1000000000"),
        ("tokenizer.json", ["added_tokens"], [{"id": 10**9, "content": "far"}], "tokenizer.json has the token id 1000000000"),
    ],
)
def test_absurd_numbers(folder: Path, file: str, keys: list[str], value: Any, message: str) -> None:
    rewritten(folder / file, *keys, value=value)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message):
        require_sane(Listing.of(folder))
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_targets_begin_with_a_token_of_the_vocabulary(folder: Path, file: str) -> None:
    """The first request ended in an index out of range."""
    rewritten(folder / "config.json", "is_encoder_decoder", value=True)
    rewritten(folder / file, "decoder_start_token_id", value=320)
    with pytest.raises(CheckpointError, match=f"{file}: decoder_start_token_id is 320, .* it takes an id below 320"):
        require_sane(Listing.of(folder))
    rewritten(folder / "config.json", "is_encoder_decoder", value=False)
    require_sane(Listing.of(folder))


def test_what_plays_no_role_may_be_what_it_likes(folder: Path) -> None:
    path = folder / "generation_config.json"
    told = {"temperature": 0, "top_k": -1, "repetition_penalty": 1, "eos_token_id": [1, -1], "suppress_tokens": [-1]}
    path.write_text(json.dumps(told))
    require_sane(Listing.of(folder))
    path.write_text(json.dumps(told | {"do_sample": True}))
    with pytest.raises(CheckpointError, match=r"temperature is 0, .* \(do_sample: false is greedy\)"):
        require_sane(Listing.of(folder))
    alone = {"low_memory": True, "assistant_ensemble_weight": 0.5}
    path.write_text(json.dumps(alone))
    require_sane(Listing.of(folder))
    for told, wrong in (({"num_beams": 2}, "low_memory is True"), ({"prompt_lookup_num_tokens": 2}, "ensemble_weight is 0.5")):
        path.write_text(json.dumps(alone | told))
        with pytest.raises(CheckpointError, match=wrong):
            require_sane(Listing.of(folder))
    path.unlink()
    rewritten(folder / "config.json", "num_beams", value=0)
    with pytest.raises(CheckpointError, match=r"config.json: num_beams is 0"):
        require_sane(Listing.of(folder))


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "float32", r"adapter in it .*merge_and_unload\(\)"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", "float32", "saved with an adapter in it"),
        ("model.layers.0.self_attn.q_proj.weight", "float8_e4m3fn", "is in float8, and config.json has no quantization_config"),
        ("model.layers.0.self_attn.q_proj.weight", "int8", "is in integers, and config.json has no quantization_config"),
        ("model.layers.0.mlp.experts.gate_up_proj", "int8", "is in integers, and config.json has no quantization_config"),
        ("model.layers.0.self_attn.q_proj.biases", "float16", "MLX packed the weights, which is not read here"),
    ],
)
def test_tensors_that_are_no_weights_yet(folder: Path, name: str, dtype: str, message: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    if name.endswith("biases"):
        rewritten(folder / "config.json", "quantization", value={"group_size": 64, "bits": 4})
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.ones(4, 4).to(getattr(torch, dtype))}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        require_sane(Listing.of(folder))


def test_deep_nesting(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config)[:-1] + ', "x": ' + "[" * 900 + "]" * 900 + "}")
    with pytest.raises(CheckpointError, match=r"nested more than 64|is not JSON"):
        require_sane(Listing.of(folder))


def test_sound_ones_pass(tiny_checkpoint: Path) -> None:
    require_sane(Listing.of(tiny_checkpoint))


def test_a_student_keeps_what_its_teacher_said_of_windows(folder: Path) -> None:
    """Qwen's configuration names the layer from which on windows slide, which a model of fewer layers never gets to."""
    rewritten(folder / "config.json", "max_window_layers", value=28)
    require_sane(Listing.of(folder))


def test_a_configuration_that_is_too_large_is_not_read(folder: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        whole = (folder / name).read_bytes()
        with (folder / name).open("r+b") as file:
            file.truncate(20 * 2**30)
        with pytest.raises(CheckpointError, match=rf"{name} has 21,474,836,480 bytes; none is so large"):
            require_sane(Listing.of(folder))
        (folder / name).write_bytes(whole)


def test_tokens_beyond_the_embedding(folder: Path) -> None:
    """As of a padding token that was added without a row of its own."""
    require_embedded(Listing.of(folder), 320)
    require_embedded(Listing.of(folder), None)
    with pytest.raises(
        CheckpointError, match=r"ids up to 319, but the embedding has only 319 rows; resize it \(resize_token_embedd"
    ):
        require_embedded(Listing.of(folder), 319)
