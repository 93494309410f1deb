"""Heads and channels of every family: the saved model is the whole one without what was cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.errors import RecipeError
from featherweight.model import surgery
from featherweight.model.architecture import blocks, dimensions, stacks
from featherweight.model.padding import without_padding
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Progress
from featherweight.pruning import structured
from featherweight.pruning.importance import importance, keep_best
from featherweight.pruning.interface import sample_blocks
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.refusals import shape_refusal
from featherweight.training.spec import FinetuneSpec
from tasks.export import export
from tasks.finetune import finetune
from tasks.quantize import quantize
from tests.support.families import FAMILIES, family_checkpoint, tiny_model
from tests.support.pruning import SMALL, logits, pruned
from tests.support.serving_models import serving_spec


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


@pytest.mark.slow
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


@pytest.mark.slow
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
