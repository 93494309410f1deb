"""Pruning of every family and in every way: the saved model is the whole one without what was cut, and engines serve it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.errors import FeatherweightError, RecipeError, StageError
from featherweight.model import surgery
from featherweight.model.architecture import blocks, dimensions, stacks
from featherweight.model.padding import without_padding
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Progress
from featherweight.pruning import attention, depth, structured, width
from featherweight.pruning.block_influence import block_influence
from featherweight.pruning.importance import importance, keep_best
from featherweight.pruning.interface import sample_blocks
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.refusals import shape_refusal
from featherweight.text.documents import Document, write_documents
from featherweight.text.model_inputs import inputs_and_labels
from featherweight.training.losses import mean_loss
from featherweight.training.spec import FinetuneSpec
from tasks.export import export
from tasks.finetune import finetune
from tasks.prune import prune
from tasks.quantize import quantize
from tests.support.families import FAMILIES, WORDS, family_checkpoint, tiny_model
from tests.support.serving_models import serving_spec

SMALL: dict[str, Any] = {"samples": 3, "sequence": 12}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    write_documents(folder, [Document(f"{n}", " ".join(draw.choices(WORDS.split(), k=80))) for n in range(12)])
    return folder


def pruned(spec: PruneSpec, source: Path, text: Path, out: Path, **options: Any) -> dict[str, float]:
    out.mkdir()
    return dict(prune(spec, checkpoint=source, calibration=text, out=out, **options))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_and_labels(model.config, ids)[0]).logits


def scored(spec: PruneSpec, source: Path, text: Path) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """The model, the calibration blocks, and the scores of its parts."""
    model, ids = opening.load_model(source), sample_blocks(spec, source, text, 0)
    groups = [part.group for part in structured.parts(model)]
    return model, ids, importance(model, groups, spec.criterion, ids, 0, Progress())[0]


def silence(part: structured.Part, kept: torch.Tensor) -> None:
    """Set what the units that are not kept write to zero."""
    outputs = [attention.o for attention in part.attentions] or [part.feed_forward.output]
    lost = torch.tensor([unit for unit in range(part.group.units) if unit not in kept.tolist()], dtype=torch.long)
    for output in outputs:
        with torch.no_grad():
            output.weight[:, surgery.group_rows(lost, output.in_features // part.group.units)] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_whole_model_with_the_rest_set_to_zero(family: str, text: Path, tmp_path: Path) -> None:
    spec, source = PruneSpec.of(**SMALL, ratio=0.5), family_checkpoint(family, tmp_path / "source")
    metrics = pruned(spec, source, text, tmp_path / "out")
    model, ids, scores = scored(spec, source, text)
    shapes = {shape.role: shape for shape in structured.target_shapes(spec, model.config)}
    for part, score in zip(structured.parts(model), scores, strict=True):
        shape = shapes[part.role]
        silence(part, keep_best(score, shape.kv_heads if part.attentions else shape.channels))
    saved = opening.load_model(tmp_path / "out")
    torch.testing.assert_close(logits(saved, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert [(size.heads, size.channels) for size in dimensions(saved.config)] == [
        (2 if family in ("llama", "t5") else 4, 24) for _ in stacks(saved)
    ]
    assert metrics["parameters"] == opening.parameters(saved) < metrics["parameters_before"]


@pytest.mark.parametrize("family", ["llama", "bert", "mbart", "t5"])
def test_a_networks_channels_are_those_of_torch_prunings_dependency_graph(family: str) -> None:
    import torch_pruning

    model = tiny_model(family)
    network = blocks(model)[-1].feed_forward
    chain = torch.nn.Module()
    chain.inputs, chain.output = torch.nn.ModuleList(network.inputs), network.output
    chain.forward = lambda x: chain.output(torch.stack([linear(x) for linear in chain.inputs]).prod(0))
    graph = torch_pruning.DependencyGraph().build_dependency(chain, torch.zeros(1, network.inputs[0].in_features))
    group = graph.get_pruning_group(network.inputs[0], torch_pruning.prune_linear_out_channels, [0])
    found = {(item.dep.target.module, int(item.dep.handler.__name__ == "prune_in_channels")) for item in group}
    found = {(module, dim) for module, dim in found if isinstance(module, torch.nn.Linear)}
    assert found == {(member.linear, member.dim) for member in structured.mlp_group(network).members}


def test_a_t5_keeps_one_head_set_per_stack_with_its_position_bias(text: Path, tmp_path: Path) -> None:
    spec, source = PruneSpec.of(**SMALL, mlp=False, ratio=0.5), family_checkpoint("t5", tmp_path / "source")
    pruned(spec, source, text, tmp_path / "out")
    model, _, scores = scored(spec, source, text)
    saved = opening.load_model(tmp_path / "out")
    for stack, other, place in zip(stacks(model), stacks(saved), (0, 3), strict=True):
        heads = keep_best(scores[place], 2)
        bias, kept = (one.blocks[0].attentions[0].module.relative_attention_bias.weight for one in (stack, other))
        assert torch.equal(kept, bias[:, heads])
        for block, cut in zip(stack.blocks, other.blocks, strict=True):
            whole = block.attentions[0].q.weight.view(4, 8, -1)
            assert torch.equal(cut.attentions[0].q.weight.view(2, 8, -1), whole[heads])
    assert (saved.config.num_heads, saved.config.d_kv, saved.config.d_ff) == (2, 8, 48)


def test_an_untied_t5_head_survives(text: Path, tmp_path: Path) -> None:
    from tests.support.families import word_tokenizer

    tokenizer = word_tokenizer("t5")
    changes = {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}
    model, source = tiny_model("t5", vocab_size=len(tokenizer), **changes), tmp_path / "source"
    model.lm_head.weight = torch.nn.Parameter(torch.randn(len(tokenizer), 32))
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    before = opening.load_model(source)
    assert not torch.equal(before.lm_head.weight, before.shared.weight)
    pruned(PruneSpec.of(**SMALL), source, text, tmp_path / "out")
    saved = opening.load_model(tmp_path / "out")
    assert torch.equal(saved.lm_head.weight, before.lm_head.weight)
    assert saved.config.scale_decoder_outputs == before.config.scale_decoder_outputs


@pytest.mark.parametrize("family", ["bert", "distilbert", "mbart"])
def test_heads_that_a_config_cannot_count_are_refused_or_left(family: str, text: Path, tmp_path: Path) -> None:
    source, notes = family_checkpoint(family, tmp_path / "source"), []
    with pytest.raises(RecipeError, match=r"prune\.attention: in a .* set prune.attention to false, or to auto"):
        pruned(PruneSpec.of(**SMALL, attention=True), source, text, tmp_path / "refused")
    assert not list((tmp_path / "refused").iterdir())

    class Listener(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    pruned(PruneSpec.of(**SMALL), source, text, tmp_path / "out", progress=Listener())
    assert any("all heads stay" in note for note in notes)


LAYERS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 3},
    "qwen2": {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
    "t5": {"num_layers": 3, "num_decoder_layers": 3},
    "marian": {"encoder_layers": 3, "decoder_layers": 3},
    "mbart": {"encoder_layers": 3, "decoder_layers": 3},
    "bert": {"num_hidden_layers": 3},
    "distilbert": {"n_layers": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", LAYERS)
def test_a_shallower_model_is_the_whole_one_with_layers_that_do_nothing(family: str, text: Path, tmp_path: Path) -> None:
    source = family_checkpoint(family, tmp_path / "source", **LAYERS[family])
    spec = PruneSpec.of(**SMALL, method="depth", layers=(1, 2))
    metrics = pruned(spec, source, text, tmp_path / "out")
    model, ids = opening.load_model(source), sample_blocks(spec, source, text, 0)
    for stack in stacks(model):
        # The first layer computes T5's position bias, so it runs, and what it makes of the hidden states is forgotten.
        stack.blocks[0].module.register_forward_hook(forget, with_kwargs=True)
    saved = opening.load_model(tmp_path / "out")
    torch.testing.assert_close(logits(saved, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert [size.layers for size in dimensions(saved.config)] == [2] * len(stacks(saved))
    assert metrics["layers"] == 2


def forget(module: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    given = arguments[0] if arguments else named["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_influence_is_one_minus_the_cosine_of_hidden_states(family: str, text: Path, tmp_path: Path) -> None:
    source = family_checkpoint(family, tmp_path / "source", **LAYERS[family])
    model, ids = opening.load_model(source), sample_blocks(PruneSpec.of(**SMALL), source, text, 0)
    influence = block_influence(model, ids)
    inputs, labels = inputs_and_labels(model.config, ids)
    with torch.no_grad():
        shown = model(**inputs, output_hidden_states=True)
    states = (
        {"decoder": shown.hidden_states}
        if family == "llama"
        else {"encoder": shown.encoder_hidden_states, "decoder": shown.decoder_hidden_states}
    )
    real = (
        {"decoder": torch.ones_like(labels) > 0}
        if family == "llama"
        else {"encoder": inputs["attention_mask"] > 0, "decoder": labels >= 0}
    )
    for role, hidden in states.items():
        for place in range(2):  # the last state that transformers shows stands behind the last norm
            x, y = (state[real[role]].double() for state in hidden[place : place + 2])
            cosine = ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean().item()
            assert influence[role][place] == pytest.approx(1 - cosine, abs=1e-5)


def test_the_layer_that_changes_least_goes_and_one_stack_can_stay(text: Path, tmp_path: Path) -> None:
    source = family_checkpoint("marian", tmp_path / "source", **LAYERS["marian"])
    model = opening.load_model(source)
    idle = stacks(model)[1].blocks[1]
    with torch.no_grad():
        for output in (*(attention.o for attention in idle.attentions), idle.feed_forward.output):
            output.weight.zero_()
            output.bias.zero_()
    model.save_pretrained(source)
    metrics = pruned(PruneSpec.of(**SMALL, method="depth", layers=2, stack="decoder"), source, text, tmp_path / "out")
    saved = opening.load_model(tmp_path / "out")
    assert [len(stack.blocks) for stack in stacks(saved)] == [3, 2]
    for place, kept in enumerate((0, 2)):
        old, new = stacks(model)[1].blocks[kept], stacks(saved)[1].blocks[place]
        assert torch.equal(new.feed_forward.output.weight, old.feed_forward.output.weight)
    assert metrics["layers"] == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": 4}, "4 layers to keep of 2"),
        ({"layers": 2}, "drops none of the 2 layers"),
        ({"layers": (1, 0)}, "must be rising layer numbers between 0 and 1"),
        ({"ratio": 0.1}, "drops none of the 2 layers"),
        ({"layers": 1, "stack": "encoder"}, "a llama has no encoder"),
    ],
)
def test_layers_that_cannot_go_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        depth.wanted_layers(PruneSpec.of(method="depth", **options), tiny_model("llama").config)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5", "qwen3"])
@pytest.mark.parametrize("criterion", ["param_first", "activation"])
def test_a_narrower_model_is_the_whole_one_with_silent_channels(family: str, criterion: str, text: Path, tmp_path: Path) -> None:
    spec = PruneSpec.of(**SMALL, method="width", hidden=24, criterion=criterion)
    source = family_checkpoint(family, tmp_path / "source", **({"tie_word_embeddings": True} if family == "llama" else {}))
    metrics = pruned(spec, source, text, tmp_path / "out")
    model, ids = opening.load_model(source), sample_blocks(spec, source, text, 0)
    if criterion == "activation":
        score = width.activations(model, ids)
    else:
        score = importance(model, [width.residual_group(model)], criterion, ids, 0, Progress())[0][0]
    silence_width(model, keep_best(score, 24))
    saved = opening.load_model(tmp_path / "out")
    torch.testing.assert_close(logits(saved, ids), logits(model, ids), rtol=1e-3, atol=1e-3)
    assert (metrics["hidden_size"], saved.config.hidden_size, dimensions(saved.config)[0].heads) == (24, 24, 4)
    assert dimensions(saved.config)[0].head_dim == 8


def silence_width(model: Any, kept: torch.Tensor) -> None:
    """Zeros in every channel that is not kept, and norms that count the kept ones only."""
    lost = [channel for channel in range(32) if channel not in kept.tolist()]
    with torch.no_grad():
        for module, dim in width.members(model):
            module.weight.transpose(0, dim)[lost] = 0
        for norm in width.norms(model):
            norm.weight[lost] = 0
            norm.weight.mul_((24 / 32) ** 0.5)
            norm.variance_epsilon *= 24 / 32


def test_activations_are_minitrons_sums_over_the_norms(text: Path, tmp_path: Path) -> None:
    source = family_checkpoint("llama", tmp_path / "source")
    model, ids = opening.load_model(source), sample_blocks(PruneSpec.of(**SMALL), source, text, 0)
    seen: dict[Any, list[torch.Tensor]] = {}
    layers = [norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    for norm in [*layers, model.model.norm]:
        norm.register_forward_hook(lambda module, _, output: seen.setdefault(module, []).append(output[0].double()))
    for block in ids:
        logits(model, block[None])
    expected = sum(torch.stack([one.abs().mean(0) for one in outputs]).norm(dim=0) for outputs in seen.values())
    assert len(seen) == 5
    torch.testing.assert_close(width.activations(model, ids), expected.float())


def test_a_hidden_size_that_follows_from_the_heads_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="hidden size of a bert is its heads times their width"):
        pruned(PruneSpec.of(method="width"), family_checkpoint("bert", tmp_path / "bert"), text, tmp_path / "a")
    with pytest.raises(RecipeError, match=r"prune\.hidden 32 removes nothing"):
        pruned(
            PruneSpec.of(method="width", hidden=32, **SMALL), family_checkpoint("llama", tmp_path / "llama"), text, tmp_path / "b"
        )


@pytest.mark.parametrize("wanted", [2, 1])
def test_pooled_heads_are_the_means_of_their_groups(wanted: int, text: Path, tmp_path: Path) -> None:
    source = family_checkpoint("qwen2", tmp_path / "source", num_key_value_heads=4)
    metrics = pruned(PruneSpec.of(**SMALL, method="attention", kv_heads=wanted), source, text, tmp_path / "out")
    whole, saved = (opening.load_model(folder) for folder in (source, tmp_path / "out"))
    for before, after in zip(blocks(whole), blocks(saved), strict=True):
        for name in ("k_proj", "v_proj"):
            old, new = (getattr(block.module.self_attn, name) for block in (before, after))
            for tensor, pooled in ((old.weight, new.weight), (old.bias, new.bias)):
                rows = tensor.double().unflatten(0, (4, 8))
                means = [sum(rows[head] for head in group) / len(group) for group in torch.arange(4).chunk(wanted)]
                torch.testing.assert_close(pooled, torch.cat(means).float())
        assert torch.equal(before.attentions[0].q.weight, after.attentions[0].q.weight)
    assert (metrics["kv_heads"], saved.config.num_key_value_heads, saved.config.num_attention_heads) == (wanted, wanted, 4)


def test_heads_that_are_alike_lose_nothing_when_pooled(text: Path, tmp_path: Path) -> None:
    source = family_checkpoint("llama", tmp_path / "source", num_key_value_heads=4)
    model = opening.load_model(source)
    with torch.no_grad():
        for block in blocks(model):
            for linear in (block.attentions[0].k, block.attentions[0].v):
                heads = linear.weight.view(2, 2, 8, -1)
                heads[:, 1] = heads[:, 0]
    model.save_pretrained(source)
    metrics = pruned(PruneSpec.of(**SMALL, method="attention", kv_heads=2), source, text, tmp_path / "out")
    ids = sample_blocks(PruneSpec.of(**SMALL), source, text, 0)
    torch.testing.assert_close(logits(opening.load_model(tmp_path / "out"), ids), logits(model, ids), rtol=1e-5, atol=1e-6)
    assert metrics["loss_after"] == pytest.approx(metrics["loss_before"], abs=1e-6)


@pytest.mark.parametrize(
    ("family", "kv_heads", "named"),
    [("llama", 2, "has 2 key/value heads; give one of 1$"), ("llama", None, "kv_heads None"), ("t5", 1, "no num_key_value_heads")],
)
def test_heads_that_cannot_be_pooled_are_refused(family: str, kv_heads: int | None, named: str, tmp_path: Path) -> None:
    config = tiny_model(family).config
    with pytest.raises(FeatherweightError, match=named):
        attention.target_heads(kv_heads, config)


def uneven(folder: Path) -> Path:
    """A Llama whose first layer's channels matter far less than its second's."""
    source = family_checkpoint("llama", folder)
    model = opening.load_model(source)
    with torch.no_grad():
        blocks(model)[0].feed_forward.output.weight[:, 4:] *= 0.01
    model.save_pretrained(source)
    return source


def test_a_global_ranking_keeps_as_many_channels_but_not_in_every_layer(text: Path, tmp_path: Path) -> None:
    spec, source = PruneSpec.of(**SMALL, scope="global", attention=False, ratio=0.5), uneven(tmp_path / "source")
    metrics = pruned(spec, source, text, tmp_path / "out")
    model, ids, scores = scored(spec, source, text)
    threshold = torch.cat([scores[1], scores[3]]).sort(descending=True).values[47]
    assert len(scores[1]) == 48
    kept = [keep_best(score, 2 * round(int((score >= threshold).sum()) / 2)) for score in (scores[1], scores[3])]
    for part, units in zip(structured.parts(model)[1::2], kept, strict=True):
        silence(part, units)
    saved = opening.load_model(tmp_path / "out")
    torch.testing.assert_close(logits(saved, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    counts = [len(units) for units in kept]
    assert (metrics["channels_least"], metrics["intermediate_size"]) == (min(counts), max(counts))
    assert metrics["padding"] == max(counts) - min(counts) > 0


@pytest.mark.engine
def test_training_leaves_padding_zero_and_ctranslate2_leaves_it_out(text: Path, tmp_path: Path) -> None:
    spec = PruneSpec.of(**SMALL, scope="global", ratio=0.5)
    metrics = pruned(spec, uneven(tmp_path / "source"), text, tmp_path / "out")
    folders = {name: tmp_path / name for name in ("trained", "rounded", "served", "served8")}
    for folder in folders.values():
        folder.mkdir()
    finetune(FinetuneSpec(steps=3, sequence=12), checkpoint=tmp_path / "out", text=text, out=folders["trained"])
    model = opening.load_model(folders["trained"])
    cut, _ = without_padding(model, None)
    widths = [block.feed_forward.output.in_features for block in blocks(cut)]
    assert sorted(widths) == [metrics["channels_least"], metrics["intermediate_size"]]
    served = export(serving_spec(engine="ctranslate2"), checkpoint=folders["trained"], calibration=text, out=folders["served"])
    assert served["parity_max_abs"] < 1e-4
    grids = QuantizeSpec.of(samples=3, sequence=12)
    quantize(grids, checkpoint=folders["trained"], text=text, calibration=text, out=folders["rounded"])
    int8 = serving_spec(engine="ctranslate2", compute_type="int8_float32")
    served = export(int8, checkpoint=folders["rounded"], calibration=text, out=folders["served8"])
    assert served["parity_max_abs"] < 1e-4
    padding = int(metrics["padding"]) * 32 * 3
    sizes = {name: (folders[name] / "ctranslate2" / "model.bin").stat().st_size for name in ("served", "served8")}
    whole, quantized = opening.parameters(opening.load_model(folders["trained"])), QuantizedWeights.read(folders["rounded"])
    assert quantized is not None
    assert sizes["served"] - 4 * (whole - padding) < 16_000  # what is not weights: names and a vocabulary
    assert sizes["served8"] < sizes["served"]


def test_only_ctranslate2_gains_by_layers_of_different_widths() -> None:
    ragged = PruneSpec.of(scope="global")
    for serve in (serving_spec(engine="vllm"), serving_spec(engine="torch"), serving_spec(engine="onnxruntime-genai")):
        reason = shape_refusal(ragged, serve)
        assert reason is not None
        assert "layers of one shape" in reason
        assert shape_refusal(PruneSpec.of(), serve) is None
    assert shape_refusal(ragged, serving_spec(engine="ctranslate2")) is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"criterion": "activation"}, "criterion\n.*vectorize"),
        ({"scope": "global", "mlp": False}, "it wants mlp"),
        ({"method": "attention"}, "wants kv_heads"),
        ({"kv_heads": 1}, "kv_heads plays no role with method structured"),
        ({"layers": 2}, "layers plays no role with method structured"),
        ({"method": "width", "stack": "decoder"}, "stack plays no role with method width"),
        ({"method": "width", "scope": "global"}, "scope plays no role with method width"),
        ({"method": "width", "hidden": 32, "ratio": 0.5}, "ratio plays no role beside hidden"),
        ({"method": "depth", "layers": 2, "ratio": 0.5}, "ratio plays no role beside layers"),
        ({"method": "depth", "criterion": "l1"}, "criterion plays no role with method depth"),
        ({"method": "depth", "pattern": "2:4"}, "pattern plays no role with method depth"),
        ({"method": "attention", "kv_heads": 1, "ratio": 0.25}, "ratio plays no role with method attention"),
        ({"method": "sparse", "ratio": 0.5}, "ratio plays no role with method sparse"),
        ({"method": "sparse", "mlp": True}, "mlp plays no role with method sparse"),
        ({"sparsity": 0.5}, "sparsity plays no role with method structured"),
    ],
)
def test_keys_that_would_be_ignored_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PruneSpec.of(**options)


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
