"""The prune stage: LLM-Pruner's own results, grouped-query models, and checkpoints that load again."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening, saving
from featherweight.errors import RecipeError, StageError
from featherweight.model import surgery
from featherweight.model.architecture import blocks
from featherweight.progress import Progress
from featherweight.pruning import structured as pruning
from featherweight.pruning.counts import kept_channels, kept_groups
from featherweight.pruning.importance import Group, importance, keep_best, taylor
from featherweight.pruning.interface import sample_blocks
from featherweight.pruning.spec import PruneSpec
from featherweight.text.documents import Document, write_documents
from featherweight.training.losses import mean_loss
from tasks.prune import prune
from tests.support.paths import SHARED

REFERENCE = SHARED / "reference" / "llm_pruner"
METHODS = {
    "taylor_vectorize_sum": "vectorize",
    "taylor_param_first_sum": "param_first",
    "taylor_param_second_sum": "param_second",
    "l2": "l2",
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CRITERIA = ("vectorize", "param_first", "param_second", "param_mix", "l1", "l2", "random")
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    write_documents(folder, [Document(path.name, path.read_text()) for path in sources])
    return folder


def checkpoint(folder: Path, tiny_checkpoint: Path, family: str = "llama", **changes: Any) -> Path:
    """A random model of `family` with the tiny checkpoint's tokenizer. Biases and norms are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny_checkpoint, folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | {"head_dim": 8} | changes))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder


def groups_of(model: Any) -> list[Group]:
    return [part.group for part in pruning.parts(model)]


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE.is_dir(), reason="no reference vectors of LLM-Pruner beside the checkout (../shared)")
@pytest.mark.parametrize("method", METHODS)
def test_it_is_llm_pruner(method: str, tmp_path: Path) -> None:
    expected = json.loads((REFERENCE / "expected.json").read_text())[method]
    blocks = torch.tensor(json.loads((REFERENCE / "calibration_ids.json").read_text()))
    spec = PruneSpec.of(criterion=METHODS[method], ratio=0.25)
    model = opening.load_model(REFERENCE)
    (shape,) = pruning.target_shapes(spec, model.config)
    scores, before = importance(model, groups_of(model), spec.criterion, blocks, 0, Progress())
    assert [keep_best(part, shape.kv_heads).tolist() for part in scores[::2]] == expected["kept_heads"]
    assert [keep_best(part, shape.channels).tolist() for part in scores[1::2]] == expected["kept_mlp_channels"]
    assert opening.parameters(model) == expected["params_before"]
    pruning.cut(pruning.parts(model), scores, [shape])
    smaller = pruning.pruned_config(model.config, [shape])
    saving.save_model(surgery.with_config(model, smaller), tmp_path)
    saved = opening.load_model(tmp_path)
    assert opening.parameters(saved) == expected["params_after"]
    assert before == pytest.approx(expected["loss_before"], abs=1e-5)
    assert mean_loss(saved, blocks) == pytest.approx(expected["loss_after"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_saved_model_is_the_whole_one_with_the_rest_set_to_zero(
    family: str, tied: bool, tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "source", tiny_checkpoint, family, tie_word_embeddings=tied)
    spec, out = PruneSpec.of(ratio=0.25, samples=6, sequence=32), tmp_path / "out"
    out.mkdir()
    metrics = prune(spec, checkpoint=source, calibration=text, out=out)
    model, blocks = opening.load_model(source), sample_blocks(spec, source, text, 0)
    scores, loss = importance(model, groups_of(model), spec.criterion, blocks, 0, Progress())
    assert metrics["loss_before"] == pytest.approx(loss, abs=1e-6)
    silence(model, [set(keep_best(part, 3).tolist()) for part in scores[::2]], 16, "o_proj")
    silence(model, [set(keep_best(part, 72).tolist()) for part in scores[1::2]], 1, "down_proj")
    assert metrics["loss_after"] == pytest.approx(mean_loss(model, blocks), abs=1e-5)
    saved = opening.load_model(out)
    assert (saved.config.num_attention_heads, saved.config.num_key_value_heads) == (6, 3)
    assert (saved.config.head_dim, saved.config.intermediate_size) == (8, 72)
    assert (saved.lm_head.weight is saved.model.embed_tokens.weight) == tied
    assert metrics["parameters"] == opening.parameters(saved) < metrics["parameters_before"]
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()}


def silence(model: Any, kept: list[set[int]], size: int, name: str) -> None:
    """Set to zero the columns of units of `size` that are not kept, in the `name` matrix of every layer."""
    for layer, units in zip(model.model.layers, kept, strict=True):
        weight = (layer.self_attn if name == "o_proj" else layer.mlp).get_submodule(name).weight
        lost = [column for column in range(weight.shape[1]) if column // size not in units]
        with torch.no_grad():
            weight[:, lost] = 0


def test_a_llama_whose_heads_do_not_divide_its_width_becomes_a_mistral(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = checkpoint(tmp_path / "source", tiny_checkpoint, rope_theta=5000.0, rms_norm_eps=1e-5)
    prune(PruneSpec.of(samples=2, sequence=32), checkpoint=source, calibration=text, out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert config["sliding_window"] is None
    assert config["rope_parameters"]["rope_theta"] == 5000.0
    assert config["rms_norm_eps"] == 1e-5
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)


def test_a_llama_whose_heads_still_divide_its_width_stays_a_llama(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = checkpoint(tmp_path / "source", tiny_checkpoint)
    prune(PruneSpec.of(ratio=0.5, samples=2, sequence=32), checkpoint=source, calibration=text, out=tmp_path / "out")
    config = opening.load_config(tmp_path / "out")
    assert (config.model_type, config.num_attention_heads, config.head_dim) == ("llama", 4, 8)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_either_half_can_be_left_alone(part: str, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    spec = PruneSpec.of(samples=2, sequence=32, attention=part == "attention", mlp=part == "mlp")
    (tmp_path / "out").mkdir()
    source = checkpoint(tmp_path / "source", tiny_checkpoint)
    metrics = prune(spec, checkpoint=source, calibration=text, out=tmp_path / "out")
    expected = (3, 96) if part == "attention" else (4, 72)
    assert (metrics["kv_heads"], metrics["intermediate_size"]) == expected


def test_every_criterion_ranks_and_they_differ(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", tiny_checkpoint)
    blocks = sample_blocks(PruneSpec.of(samples=4, sequence=32), source, text, 0)
    model = opening.load_model(source)
    ranks = {}
    for criterion in CRITERIA:
        scores, _ = importance(model, groups_of(model), criterion, blocks, 0, Progress())
        assert [len(part) for part in scores] == [4, 96, 4, 96]
        assert all(torch.isfinite(part).all() and (part >= 0).all() for part in scores)
        ranks[criterion] = tuple(scores[1].argsort().tolist())
    assert len(set(ranks.values())) == len(CRITERIA)


def test_the_mixed_criterion_is_slope_minus_half_the_curvature(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", tiny_checkpoint)
    blocks = sample_blocks(PruneSpec.of(samples=4, sequence=32), source, text, 0)
    model = opening.load_model(source)
    gradients = []
    for block in blocks:
        model.zero_grad()
        model(input_ids=block[None], labels=block[None]).loss.backward()
        gradients.append(model.model.layers[1].mlp.up_proj.weight.grad.double())
    slope, fisher = sum(gradients) / 4, sum(gradient**2 for gradient in gradients) / 4
    weight = model.model.layers[1].mlp.up_proj.weight
    (salience,), _ = taylor(model, [weight], "param_mix", blocks, Progress())
    expected = (weight * slope - 0.5 * weight * fisher * weight).float().detach()
    torch.testing.assert_close(salience, expected, rtol=1e-3, atol=1e-8)


def test_query_heads_go_with_their_key_value_group(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = opening.load_model(checkpoint(tmp_path / "source", tiny_checkpoint))
    layer = model.model.layers[0]
    whole = {name: layer.self_attn.get_submodule(name).weight.clone() for name in ("q_proj", "k_proj", "o_proj")}
    surgery.keep_attention_groups(blocks(model)[0].attentions[0], torch.tensor([0, 2]))
    assert torch.equal(layer.self_attn.q_proj.weight, torch.cat([whole["q_proj"][:16], whole["q_proj"][32:48]]))
    assert torch.equal(layer.self_attn.k_proj.weight, torch.cat([whole["k_proj"][:8], whole["k_proj"][16:24]]))
    kept = torch.cat([whole["o_proj"][:, :16], whole["o_proj"][:, 32:48]], dim=1)
    assert torch.equal(layer.self_attn.o_proj.weight, kept)


@pytest.mark.parametrize(
    ("groups", "head_dim", "ratio", "kept"), [(8, 12, 0.25, 6), (6, 48, 0.25, 5), (2, 32, 0.25, 2), (4, 8, 0.99, 1)]
)
def test_whole_groups_stay_and_never_none(groups: int, head_dim: int, ratio: float, kept: int) -> None:
    assert kept_groups(groups, head_dim, ratio) == kept


@pytest.mark.parametrize(
    ("channels", "ratio", "kept"),
    [(256, 0.25, 192), (688, 0.25, 512), (768, 0.25, 576), (11008, 0.2, 8800), (96, 0.25, 72), (64, 0.99, 4)],
)
def test_channels_stay_in_multiples_that_kernels_like(channels: int, ratio: float, kept: int) -> None:
    assert kept_channels(channels, ratio) == kept


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ratio": 0.001}, "removes nothing"),
        ({"attention": False, "mlp": False}, "removes nothing"),
    ],
)
def test_what_no_engine_could_load_is_refused(
    changes: dict[str, Any], named: str, tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=named):
        prune(PruneSpec.of(**changes), checkpoint=tiny_checkpoint, calibration=text, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_llama_with_biases_that_no_mistral_holds_is_refused(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", tiny_checkpoint, attention_bias=True)
    with pytest.raises(StageError, match="Llama with biases cannot have 6 heads at hidden size 64"):
        prune(PruneSpec.of(), checkpoint=source, calibration=text, out=tmp_path)


def test_an_architecture_without_such_groups_is_refused(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", tiny_checkpoint)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(StageError, match="the structure of a 'mamba' model is not known here"):
        prune(PruneSpec.of(), checkpoint=source, calibration=text, out=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["param_mix", "random"])
def test_the_same_seed_gives_the_same_bytes(criterion: str, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    spec = PruneSpec.of(criterion=criterion, samples=4, sequence=32)
    source = checkpoint(tmp_path / "source", tiny_checkpoint)
    digests = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        prune(spec, checkpoint=source, calibration=text, out=tmp_path / name, seed=seed)
        digests.append(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    assert criterion != "random" or digests[0] != digests[2]
