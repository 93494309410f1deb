"""What a plan costs: estimates scale with the model and its text, and what cannot fit the machine is said."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from featherweight.distillation.spec import DistillSpec
from featherweight.errors import RecipeError
from featherweight.model.facts import CheckpointFacts, Values
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe import fit
from featherweight.recipe.cost import Speeds, _work, estimate, machine_speeds
from featherweight.recipe.facts import Facts
from featherweight.recipe.memory import AT_ONCE, PYTHON_BYTES, held_bytes, served_bytes
from featherweight.recipe.plan import Node, expand
from featherweight.recipe.recipe import Recipe
from featherweight.recipe.refusals import disk_refusal, memory_refusal
from featherweight.recipe.sizes import sizes
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.spec import ModelSize
from featherweight.system.machine import Machine
from tests.support.serving_models import serving_spec

SPEEDS = Speeds(1e11, 1e10)
MACHINE = Machine("Linux", "x86_64", "some", frozenset(), 2, 2, 2**33, ())


def recipe(**stages: Any) -> Recipe:
    """Two ways to serve a checkpoint, behind these alternatives of quantize."""
    return Recipe.model_validate(
        {
            "name": "try",
            "checkpoint": {"source": "here"},
            "data": {"source": "text"},
            "stages": {"export": {"ct2": {"engine": "ctranslate2", "compute_type": "int8"}}, "quantize": stages},
            "promote": {"model": "try"},
        }
    )


def decoder(layers: int, hidden: int, vocabulary: int = 32000) -> CheckpointFacts:
    """The facts of a Llama of this size, with the shapes of its matrices."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048, "head_dim": 64}
    config |= {"num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": vocabulary, "num_attention_heads": hidden // 64}
    config |= {"intermediate_size": 4 * hidden, "is_encoder_decoder": False, "pad_token_id": None, "tie_word_embeddings": True}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"model.layers.{layer}.mlp.{name}_proj.weight": (4 * hidden, hidden) for name in ("up", "gate")}
        shapes |= {f"model.layers.{layer}.mlp.down_proj.weight": (hidden, 4 * hidden)}
    return CheckpointFacts(Values({"values": config, "names": {}, "class": "LlamaConfig"}), shapes=shapes)


def costs(facts: CheckpointFacts | None, wanted: Recipe, speeds: Speeds = SPEEDS) -> dict[str, float]:
    plan = expand(wanted, MACHINE, Facts({"here": facts} if facts else {}))
    return {id: cost.seconds for id, cost in estimate(plan, {}, set(), facts.size if facts else ModelSize(0), speeds).items()}


def test_every_stage_that_handles_weights_grows_with_the_model() -> None:
    wanted = recipe(q={})
    small, large = costs(decoder(6, 256), wanted), costs(decoder(24, 1024), wanted)
    grown = {id for id in small if large[id] > 5 * small[id]}
    assert {"q", "ct2", "q/ct2", "ct2/evaluate", "baseline/evaluate", "checkpoint"} <= grown
    assert all(large[id] == small[id] for id in ("text/train", "gate", "decide", "promote"))


def smaller(stages: dict[str, Any], chosen: dict[str, str]) -> Recipe:
    """One variant, exported from what these stages leave."""
    tree = recipe().model_dump() | {"stages": {"export": {"ct2": {"engine": "ctranslate2"}}, **stages}, "variants": None}
    return Recipe.model_validate(tree | {"variants": [chosen | {"serve": "ct2"}]})


def test_a_variant_costs_what_is_left_of_the_model() -> None:
    facts = decoder(12, 512)
    whole = costs(facts, recipe())
    half = costs(facts, smaller({"distill": {"d": {"layers": 6, "steps": 1}}}, {"distill": "d"}))
    cut = costs(facts, smaller({"prune": {"p": {"ratio": 0.5, "finetune": None}}}, {"prune": "p"}))
    writing = RUNTIMES["ctranslate2"].writing_s
    assert half["d/ct2"] - writing < 0.75 * (whole["ct2"] - writing)
    assert cut["p/ct2"] - writing < 0.85 * (whole["ct2"] - writing)
    assert half["baseline/evaluate"] == whole["baseline/evaluate"] == cut["baseline/evaluate"]
    assert half["baseline/evaluate"] < half["d/ct2/evaluate"] < whole["ct2/evaluate"]


@pytest.mark.parametrize(
    ("spec", "real"),
    [
        (PruneSpec.of(method="depth", ratio=0.5), decoder(6, 512)),
        (PruneSpec.of(method="width", ratio=0.5), decoder(12, 256)),
        (DistillSpec.model_validate({"layers": [0, 5, 11], "steps": 1}), decoder(3, 512)),
        (DistillSpec.model_validate({"prune": {"method": "depth", "layers": 4}, "steps": 1}), decoder(4, 512)),
    ],
)
def test_what_is_left_is_about_what_a_smaller_model_has(spec: PruneSpec | DistillSpec, real: CheckpointFacts) -> None:
    """The width is left out of the comparison of attention: it grows with the hidden size twice, and heads stay."""
    left = spec.left(decoder(12, 512).size)
    assert left.table == real.size.table and left.layers == real.size.layers
    if getattr(spec, "method", "") != "width":
        assert dataclasses.replace(left, matrices=0) == dataclasses.replace(real.size, matrices=0)


def test_a_student_of_its_own_has_its_own_size() -> None:
    facts, wanted = decoder(12, 512), smaller({"distill": {"d": {"student": "there", "steps": 1}}}, {"distill": "d"})
    plan = expand(wanted, MACHINE, Facts({"here": facts}))
    given = sizes(plan.nodes, facts.size, {"there": ModelSize(1000)})
    assert given["d"] == facts.size and given["d/ct2"] == ModelSize(1000) == given["d/ct2/evaluate"]


def test_autoround_costs_what_its_blocks_do_whatever_the_vocabulary_and_what_it_took() -> None:
    """38.5 CPU seconds of one core for stories15M, whose embedding is 61 % of its weights."""
    spec = QuantizeSpec.of(method="autoround", grid="int4-g32", samples=64, sequence=128, steps=40)
    small, large = (spec.operations(decoder(6, 256, vocabulary).size) for vocabulary in (1000, 128000))
    assert small == large
    stories = ModelSize(15191712, 43, 14976, table=9216000, widest=768, layers=6, outside=9219744)
    work = _work(Node("q", "quantize", "q", spec), {"q": stories})
    assert 0.5 < work.seconds(Speeds(9.96e10, 1e10)) / 38.5 < 2


def test_a_scan_costs_a_pass_for_each_matrix() -> None:
    mixed = {"method": "gptq", "grid": "int4-g32", "head": "int8", "mixed": {"grid": "int8", "budget": 0.1}}
    exported = {"torch": {"engine": "torchao-int4"}}
    wanted = recipe(mix=mixed)
    wanted = Recipe.model_validate(wanted.model_dump() | {"stages": {"quantize": {"mix": mixed}, "export": exported}})
    few, many = costs(decoder(6, 256), wanted)["mix+sensitivity"], costs(decoder(24, 256), wanted)["mix+sensitivity"]
    assert 4 < many / few < 16


def test_a_slower_machine_takes_longer_and_a_cached_node_nothing() -> None:
    wanted, facts = recipe(q={}), decoder(12, 512)
    quick, slow = costs(facts, wanted), costs(facts, wanted, Speeds(2.5e10, 2.5e9))
    assert 2 < slow["ct2/evaluate"] / quick["ct2/evaluate"] <= 4
    plan = expand(wanted, MACHINE, Facts({"here": facts}))
    assert estimate(plan, {"gate": 3.5}, {"checkpoint"}, facts.size, SPEEDS)["checkpoint"].seconds == 0
    assert estimate(plan, {"gate": 3.5}, {"checkpoint"}, facts.size, SPEEDS)["gate"].basis == "measured"


def test_the_size_of_a_model_is_what_its_headers_or_its_configuration_say() -> None:
    facts = decoder(12, 512)
    told = facts.size
    sizes = {"table": 32000 * 512, "widest": 4 * 512, "layers": 12, "outside": 32000 * 512}
    assert told == ModelSize(32000 * 512 + 12 * 16 * 512 * 512, 85, 12 * 10 * 512, **sizes)
    packed = dataclasses.replace(facts, shapes=None).size
    assert packed.parameters == pytest.approx(told.parameters, rel=0.01)
    assert (packed.matrices, packed.columns) == (told.matrices, told.columns)
    assert Facts().size(recipe()) == ModelSize(0)


def test_what_cannot_fit_is_refused_and_what_comes_near_is_warned_of() -> None:
    seven, plenty = ModelSize(7_000_000_000, 225, 0), 2**40
    assert "7.0 billion weights take 26.1 GiB in float32" in str(memory_refusal(seven, 24 * 2**30))
    assert memory_refusal(seven, 32 * 2**30) is None
    assert "takes 26.1 GiB in the workspace, and its disk has 20.0 GiB free" in str(disk_refusal(seven, 20 * 2**30))
    plan = expand(recipe(q={}), MACHINE)
    near = fit.warnings(plan, seven, 48 * 2**30, 60 * 2**30, ())
    assert any("q holds about 91.9 GiB at once, and this machine has 48.0 GiB of memory" in line for line in near)
    assert any("the results take about" in line for line in near)
    assert fit.warnings(plan, seven, plenty, plenty, ()) == []
    assert fit.warnings(plan, ModelSize(10**6), 2**33, 2**33, ()) == []


QWEN2_1_5B = ModelSize(1_543_714_304, 197, 28 * (6 * 1536 + 8960), table=151_936 * 1536, widest=8960, layers=28)
LLAMA_8B = ModelSize(8_030_261_248, 225, 32 * (6 * 4096 + 14336), table=128_256 * 4096, widest=14336, layers=32)


QWEN2_SMALL = ModelSize(213_336_064, 113, 16 * (6 * 1024 + 2816), table=32_000 * 1024, widest=2816, layers=16)


@pytest.mark.parametrize(
    ("size", "stage", "spec", "measured"),
    [
        (QWEN2_1_5B, "quantize", {"method": "gptq", "grid": "int4-g32"}, 2.2),
        (QWEN2_SMALL, "quantize", {"method": "gptq", "grid": "int4-g32"}, 2.49),
        (QWEN2_SMALL, "quantize", {"method": "smoothquant", "grid": "int8"}, 2.95),
        (QWEN2_SMALL, "quantize", {"method": "awq", "grid": "int4-g32"}, 3.04),
        (QWEN2_SMALL, "quantize", {"method": "autoround", "grid": "int4-g32"}, 2.42),
        (QWEN2_SMALL, "quantize", {"method": "qat", "grid": "int8", "start": "rtn"}, 6.1),
        (QWEN2_SMALL, "prune", {"method": "width"}, 3.02),
    ],
)  # fmt: skip
def test_memory_is_estimated_at_what_was_measured(size: ModelSize, stage: str, spec: dict[str, str], measured: float) -> None:
    """GiB of anonymous memory, by `python -m benchmarks.memory`: within a factor of two."""
    kinds = {"quantize": QuantizeSpec, "prune": PruneSpec}
    estimated = held_bytes(Node("x", stage, "x", kinds[stage].of(**spec)), size) / 2**30
    assert measured / 2 < estimated < 2 * measured


def test_fewer_bits_take_less_memory_to_write_and_to_serve() -> None:
    specs = [serving_spec(engine="onnxruntime-genai", precision=precision) for precision in ("float32", "int8", "int4", "int2")]
    served = [served_bytes(spec, QWEN2_1_5B) for spec in specs]
    assert served == sorted(served, reverse=True)
    assert served[2] - served[3] == pytest.approx(QWEN2_1_5B.parameters * 2.5 / 8)


def test_a_variant_that_memory_cannot_hold_is_ruled_out_and_what_streams_is_not() -> None:
    facts = dataclasses.replace(decoder(24, 2048), size_bytes=2)
    assert 1e9 < facts.parameters < 3e9
    machine = dataclasses.replace(MACHINE, memory_bytes=12 * 2**30)
    plan = expand(recipe(gptq={"method": "gptq"}, qat={"method": "qat"}), machine, Facts({"here": facts}))
    assert "gptq/ct2" in {variant.name for variant in plan.variants}
    assert re.search(r"^quantize of 1\.\d billion weights holds about \S+ GiB at once, and .* 12\.0 GiB", plan.ruled_out["qat/ct2"])
    assert expand(recipe(qat={"method": "qat"}), MACHINE).ruled_out == {}  # whose size is not known
    told = fit.needs(plan, facts.size)
    assert told["gptq"] < 6 * 2**30 < told["baseline/evaluate"]
    encoder = dataclasses.replace(facts.size, in_files=False)
    assert held_bytes(plan.nodes["gptq"], encoder) > 3 * told["gptq"]


def test_eight_billion_weights_are_rounded_and_calibrated_within_24_gib() -> None:
    for method in ("rtn", "gptq"):
        spec = QuantizeSpec.of(method=method, grid="int4-g32" if method == "gptq" else "int8")
        assert held_bytes(Node("x", "quantize", "x", spec), LLAMA_8B) < 24 * 2**30


def test_an_untied_head_is_no_part_of_the_blocks() -> None:
    """A block is what calibration holds and what pruning cuts; head and embedding are there beside it."""
    spec = QuantizeSpec.of(method="gptq", grid="int4-g32")
    apart = dataclasses.replace(LLAMA_8B, outside=2 * LLAMA_8B.table)
    held = [held_bytes(Node("x", "quantize", "x", spec), size) for size in (LLAMA_8B, apart)]
    largest = max(AT_ONCE * 4 * apart.table, 4 * (2 * apart.in_blocks / 32 + 4 * apart.widest**2))
    assert held[1] == pytest.approx(2 * PYTHON_BYTES + 4 * apart.parameters / 32 + largest)
    assert held[1] < held[0]
    half = apart.kept(depth=0.5)
    assert half.outside == apart.outside
    assert half.parameters == pytest.approx(apart.outside + apart.in_blocks / 2)
    assert apart.kept(hidden=0.5).parameters == pytest.approx(apart.parameters / 2, rel=1e-6)


def test_a_plan_for_a_machine_that_is_too_small_is_refused() -> None:
    large = dataclasses.replace(decoder(80, 8192), shapes=None)
    with pytest.raises(RecipeError, match=r"billion weights take .* and this machine has 8.0 GiB of memory"):
        expand(recipe(), MACHINE, Facts({"here": large}))


@pytest.mark.parametrize(
    ("memory_gib", "stored", "served"),
    [
        (24, 2, "bfloat16"),
        (40, 2, "float32"),
        (12, 2, "billion weights take .* in bfloat16"),
        (24, 4, "weights take .* in float32"),
    ],
)
def test_a_baseline_too_large_for_float32_is_served_as_the_checkpoint_is_stored(memory_gib: int, stored: int, served: str) -> None:
    """8 billion weights: their plan is one for 24 GiB, and says how the baseline is served."""
    told = decoder(32, 4096, 128_256)
    config = Values({"values": told.config.to_dict() | {"dtype": "bfloat16"}, "names": {}, "class": "LlamaConfig"})
    facts = dataclasses.replace(told, config=config, size_bytes=stored * told.parameters)
    assert 7e9 < facts.parameters < 10e9
    machine, made = dataclasses.replace(MACHINE, memory_bytes=memory_gib * 2**30), recipe(q={"method": "gptq"})
    if "billion" in served or "weights" in served:
        with pytest.raises(RecipeError, match=served):
            expand(made, machine, Facts({"here": facts}))
        return
    plan = expand(made, machine, Facts({"here": facts}))
    assert plan.nodes["baseline"].spec.model_dump()["compute_type"] == served
    warned = fit.warnings(plan, facts.size, machine.memory_bytes, 2**40, ())
    assert any("the baseline is served in bfloat16" in line for line in warned) == (served == "bfloat16")


def test_speeds_are_those_of_some_machine_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = machine_speeds()
    assert machine_speeds() == found
    assert 1e9 < found.flops < 1e15
    assert 1e8 < found.bandwidth < 1e13
