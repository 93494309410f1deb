"""Names and shapes that do not fit are told before any weight is read, for whatever transformers builds, by its own loading."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from featherweight.checkpoint import dry_run
from featherweight.checkpoint.dry_run import Shapes, require_loadable
from featherweight.errors import CheckpointError

SMALL = {"vocab_size": 40, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
TOLD: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 40, "n_layer": 2, "n_embd": 32, "n_head": 2},
    "gemma2": SMALL | {"intermediate_size": 48, "head_dim": 16},
    "qwen3_moe": SMALL | {"num_experts": 3, "moe_intermediate_size": 16, "intermediate_size": 48, "head_dim": 16},
    "pegasus": {"vocab_size": 40, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48},
}


def written(kind: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """config.json in the folder, and the names and shapes that transformers would store."""
    config = AutoConfig.for_model(kind, **TOLD[kind])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": [type(model).__name__]}))
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return dict(_one_by_one(shapes, config.num_experts)) if kind == "qwen3_moe" else shapes


def _one_by_one(shapes: Shapes, count: int) -> Any:
    """Experts as files hold them: each by itself, gate and up apart."""
    for name, shape in shapes.items():
        place, _, part = name.rpartition(".experts.")
        for expert in range(count if place else 0):
            for one in ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,):
                rows = shape[1] // 2 if part == "gate_up_proj" else shape[1]
                yield f"{place}.experts.{expert}.{one}.weight", (rows, shape[2])
        if not place:
            yield name, shape


@pytest.mark.parametrize("kind", TOLD)
def test_what_fits_is_taken_under_any_name_that_loading_settles(kind: str, tmp_path: Path) -> None:
    shapes = written(kind, tmp_path)
    for names in (lambda name: name, lambda name: f"_orig_mod.{name}", lambda name: f"module.{name}"):
        require_loadable("given", tmp_path, {}, {names(name): shape for name, shape in shapes.items()})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": not config.get("tie_word_embeddings", True)}))
    require_loadable("given", tmp_path, {}, shapes)


@pytest.mark.parametrize(
    ("kind", "name", "missing", "shape"),
    [
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", "c_fc.weight of GPT2LMHeadModel is missing", r"has shape \[31, 128\]"),
        ("gemma2", "model.layers.0.mlp.up_proj.weight", "up_proj.weight of Gemma2ForCausalLM is missing", r"shape \[47, 32\]"),
        (
            "qwen3_moe",
            "model.layers.1.mlp.experts.1.up_proj.weight",
            "up_proj.weight is missing",
            r"\[15, 32\], the others' \[16, 32\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(kind: str, name: str, missing: str, shape: str, tmp_path: Path) -> None:
    shapes = written(kind, tmp_path)
    rows, *columns = shapes[name]
    rest = {one: its for one, its in shapes.items() if one != name}
    for wrong, message in (
        (rest, missing),
        (shapes | {name: (rows - 1, *columns)}, shape),
        (shapes | {"odd": (1,)}, "tensor odd has no"),
    ):
        with pytest.raises(CheckpointError, match=f"^given: .*{message}") as found:
            require_loadable("given", tmp_path, {}, wrong)
        assert not re.search(re.escape(str(tmp_path)), str(found.value))


def test_another_python_is_asked_where_torch_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = written("gpt2", tmp_path)
    calls: list[Any] = []
    monkeypatch.delitem(dry_run.sys.modules, "torch")
    monkeypatch.setattr(dry_run.asking, "asked", lambda *told: calls.append(told) or {"refused": True, "error": "so it says"})
    with pytest.raises(CheckpointError, match="given: so it says"):
        require_loadable("given", tmp_path, {}, shapes)
    module, arguments, _, given = calls[0]
    assert (module, arguments) == ("featherweight.checkpoint.dry_run", [str(tmp_path)])
    assert set(json.loads(given)["shapes"]) == set(shapes)


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    """transformers took one of them, and the load stage the other."""
    shapes = written("gpt2", tmp_path)
    twice = shapes | {"ln_f.weight": shapes["transformer.ln_f.weight"]}
    with pytest.raises(CheckpointError, match=r"tensors ln_f.weight and transformer.ln_f.weight are both transformer.ln_f.weight"):
        require_loadable("given", tmp_path, {}, twice)


def test_a_configuration_that_builds_no_model_is_told_of_before_weights_are_read(tmp_path: Path) -> None:
    shapes = written("gpt2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_head": 0}))
    with pytest.raises(CheckpointError, match=r"given: config.json describes no model that transformers can build: .*division"):
        require_loadable("given", tmp_path, {}, shapes)
