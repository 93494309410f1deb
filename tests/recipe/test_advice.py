"""Advice as rules: a model, a machine and a workload go in, an engine and a grid with reasons come out. Nothing is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from featherweight.grid import GRIDS
from featherweight.model.facts import CheckpointFacts
from featherweight.recipe.advice.advice import Advice, advise
from featherweight.recipe.advice.candidates import Question
from featherweight.recipe.advice.expected import Asked
from featherweight.recipe.advice.hardware import Roofs, card_of, described, roofs_of
from featherweight.recipe.advice.measured import Before
from featherweight.recipe.advice.rules import NAMES
from featherweight.recipe.advice.shape import Shape
from featherweight.spec import Task
from featherweight.system.device import CPU, CUDA
from featherweight.system.gpu import Gpu
from featherweight.system.machine import Machine
from tests.support.advising import EIGHT, ONE, SEVENTY, SMALL, encoder, llama, machine, t5


def asked(facts: CheckpointFacts, there: Machine, work: Asked = Asked(), **more: Any) -> Advice:
    """The advice on a model and a machine of 8 cores, 20 GB/s and half a teraflop, or on its GPUs."""
    flops = dict.fromkeys(("float32", "float16", "int8", "fp8"), 5e11)
    roofs = roofs_of(there, CUDA) if there.gpus else Roofs(CPU, there.memory_bytes, 2e10, flops)  # type: ignore[arg-type]
    return advise(Question("model", facts, facts.task, there, roofs, work, here=False, **more))


def best(advice: Advice) -> str:
    return advice.recommended.name if advice.recommended else ""


def users(number: int) -> Asked:
    return Asked(512, 256, number, concurrent=True)


def pick(advice: Advice) -> tuple[str, str]:
    """The engine of the two, and the rule that decided."""
    return advice.ruling.engine, advice.ruling.rule


def test_a_small_decoder_on_a_cpu_alone() -> None:
    advice = asked(SMALL, machine())
    assert best(advice) == "onnxruntime-genai int8"
    assert pick(advice) == ("ctranslate2", "a CPU alone")
    assert "benchmarks/README.md" in advice.ruling.source and "vllm" in advice.ruling.reason


def test_where_little_quality_may_go_four_bits_wait_for_more() -> None:
    tight, loose = asked(SMALL, machine(), max_loss=0.005), asked(SMALL, machine(), max_loss=0.05)
    assert tight.recommended and tight.recommended.offer.grid == "int8"
    assert loose.recommended and loose.recommended.offer.grid == "int4-g32"
    sees = loose.recommended.expected
    assert sees and tight.recommended.expected and sees.tokens_per_s > tight.recommended.expected.tokens_per_s


def test_a_billion_weights_and_sixteen_users_on_a_cpu() -> None:
    advice = asked(ONE, machine(), users(16))
    assert advice.recommended and advice.recommended.can_serve
    assert advice.ruling.rule in ("a CPU alone", "the faster one") and advice.ruling.engine in NAMES
    alone = asked(ONE, machine())
    assert alone.ruling.engine == "ctranslate2"


def test_eight_billion_on_one_gpu_of_24_gib() -> None:
    advice = asked(EIGHT, machine(64, 1, 24, (8, 9)))
    assert advice.recommended and advice.recommended.expected and advice.recommended.expected.memory_bytes < 0.9 * 24 * 2**30
    whole = next(row for row in advice.rows if row.name == "torch float32")
    assert whole.too_large and "and there are 24.0 GiB" in whole.too_large
    assert "pays for a server" not in advice.ruling.reason


def test_eight_billion_and_sixty_four_users_on_80_gib() -> None:
    advice = asked(EIGHT, machine(256, 1, 80), users(64))
    assert advice.recommended and advice.recommended.engine == "vllm"
    assert pick(advice) == ("vllm", "many at a time on a GPU")
    assert "continuous batching" in advice.headline and "64 requests" in advice.ruling.reason


def test_seventy_billion_on_two_gpus() -> None:
    advice = asked(SEVENTY, machine(512, 2, 80), users(64))
    assert pick(advice) == ("vllm", "several GPUs")
    assert advice.recommended and advice.recommended.offer.parts == 2
    assert "2 GPUs share every layer" in advice.headline and advice.ruling.source.startswith("docs.vllm.ai")
    halves = next(row for row in advice.rows if row.name == "vllm float16, 2 GPUs")
    assert halves.too_large and "on each of 2 GPUs" in halves.too_large


@pytest.mark.parametrize("gpus", [0, 1])
def test_an_encoder_decoder_is_ctranslate2s(gpus: int) -> None:
    advice = asked(t5(), machine(gpus=gpus))
    assert advice.recommended and advice.recommended.engine == "ctranslate2"
    assert pick(advice) == ("ctranslate2", "one cannot serve") and "encoder-decoder" in advice.ruling.reason


@pytest.mark.parametrize(
    ("architecture", "task"), [("BertModel", "feature-extraction"), ("BertForSequenceClassification", "text-classification")]
)
def test_encoders_are_not_vllms(architecture: str, task: Task) -> None:
    advice = asked(encoder("bert", architecture, task), machine())
    assert pick(advice) == ("ctranslate2", "one cannot serve")
    assert advice.recommended and advice.recommended.engine == "ctranslate2"
    assert all(row.expected and row.expected.cache_bytes == 0 for row in advice.rows if row.can_serve)


def test_filling_masks_is_neithers() -> None:
    advice = asked(encoder("bert", "BertForMaskedLM", "fill-mask"), machine())
    assert pick(advice) == ("", "one cannot serve") and advice.ruling.line.startswith("neither")
    assert advice.recommended and advice.recommended.name == "openvino int8"
    told = asked(encoder("bert", "BertForMaskedLM", "fill-mask"), replace(machine(), cpu_features=frozenset({"avx2"})))
    assert told.recommended and told.recommended.engine == "onnxruntime"  # whose products of many rows are the faster ones


def test_experts_stay_in_float_and_are_read_as_they_are_asked_for() -> None:
    experts = {f"model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight": (2048, 1024) for i in range(8) for e in range(8)}
    plain = {f"model.layers.{i}.self_attn.q_proj.weight": (1024, 1024) for i in range(8)}
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
    facts = llama(8, 1024, 2048, 16, 8, config=config, shapes=experts | plain)
    shape = Shape.of(facts)
    assert shape.active == 0.25 and shape.read(1) < shape.read(8) < 1.0
    advice = asked(facts, machine())
    assert advice.recommended and advice.recommended.offer.grid is None
    assert any("nothing moves to a grid" in str(row.refused) for row in advice.rows)
    assert any("of whom a token asks 25%" in note for note in advice.notes)


def test_a_sliding_window_bounds_the_cache_and_rules_out_who_overlooks_it() -> None:
    facts = llama(
        12, 768, 2048, 12, 12, config={"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    )
    advice = asked(facts, machine())
    assert pick(advice) == ("vllm", "one cannot serve") and "sliding window of 64" in advice.ruling.reason
    row, wide = (next(row for row in one.rows if row.name == "torch float32") for one in (advice, asked(SMALL, machine())))
    assert row.expected and wide.expected and row.expected.cache_bytes == wide.expected.cache_bytes / 4


def test_a_gguf_file_keeps_its_integers() -> None:
    names = (*(f"blk.{i}.attn_q.weight" for i in range(12)), "token_embd.weight")
    advice = asked(replace(SMALL, quantized="gguf", grids=dict.fromkeys(names, GRIDS["int8-g32"])), machine())
    assert advice.recommended and advice.recommended.engine == "onnxruntime-genai" and advice.recommended.quantize is None
    assert advice.recommended.offer.grid == "int8-g32" and any("nothing is rounded again" in note for note in advice.notes)
    assert "CTranslate2 packs one scale per row" in advice.ruling.reason


def test_four_bits_of_somebody_else_go_where_they_fit() -> None:
    kept = replace(EIGHT, quantized="gptq", grids={"model.layers.0.body.weight": GRIDS["int4-g128"]})
    advice = asked(kept, machine(64, 1, 24, (8, 0)), users(16))
    assert pick(advice)[0] == "vllm" and advice.recommended
    assert (advice.recommended.name, advice.recommended.quantize) == ("vllm w4a16 on int4-g128", None)


@pytest.mark.parametrize(
    ("capability", "refused", "serves"),
    [((7, 5), "bfloat16", "vllm float16"), ((9, 0), None, "vllm bfloat16")],
)
def test_what_an_old_gpu_has_no_kernel_for(capability: tuple[int, int], refused: str | None, serves: str) -> None:
    advice = asked(ONE, machine(64, 1, 16, capability))
    reasons = {row.name: row.refused for row in advice.rows}
    assert reasons[serves] is None
    assert (refused is None) == (reasons["vllm bfloat16"] is None)
    assert refused is None or "sm_75" in str(reasons["vllm bfloat16"])


def test_where_nothing_fits_it_says_what_would() -> None:
    advice = asked(EIGHT, machine(4))
    assert advice.recommended is None and advice.ruling.engine == ""
    assert "GiB of memory would do, or a model of at most about" in advice.headline
    assert any("to make variants of it" in note for note in advice.notes)
    assert advice.to_dict()["recommended"] is None


def test_what_was_measured_here_stands_in_for_what_is_assumed() -> None:
    key = ("ctranslate2", "int8", "int8", "cpu")
    plain = asked(SMALL, machine())
    size = next(row.expected for row in plain.rows if row.name == "ctranslate2 int8")
    assert size
    told = asked(SMALL, machine(), before=Before({key: [(size.weights_bytes, 18e9)]}, {key: 0.004}))
    row = next(row for row in told.rows if row.name == "ctranslate2 int8")
    assert row.expected and row.measured and row.expected.loss == pytest.approx(0.004)
    assert row.expected.basis == "measured in this workspace" and row.expected.tokens_per_s > size.tokens_per_s
    assert told.recommended is row
    far = asked(SMALL, machine(), before=Before({key: [(size.weights_bytes * 100, 18e9)]}))
    assert next(row for row in far.rows if row.name == "ctranslate2 int8").expected == size


def test_what_was_measured_is_found_by_what_a_recipe_leaves_to_its_default() -> None:
    """A run's recipe is kept with every default in it, and an offer may say none of them."""
    for engine, keys, name in (
        ("torchscript", "float32", "torchscript float32"),
        ("onnxruntime-genai", "float32", "onnxruntime-genai float32"),
    ):
        told = asked(SMALL, machine(), before=Before({(engine, keys, None, "cpu"): [(4e8, 15e9)]}, {}))
        (row,) = [one for one in told.rows if one.engine == engine and one.offer.grid is None]
        assert row.name == name and row.expected and row.expected.basis == "measured in this workspace", (engine, row)


SMOL = llama(30, 576, 1536, 9, 3, config={"vocab_size": 49152}, shapes={"all": (134_515_008,)})
"""SmolLM2-135M's shape."""
AVX2, VNNI_ONES = (15.7e9, 1.32e11), (2.65e10, 2.15e11)
"""(bytes, operations) per second of the machines of benchmarks/README.md, as its eager float32 tells them."""


def ratios(features: frozenset[str], roofs: tuple[float, float], work: Asked) -> dict[str, tuple[float, float]]:
    """Tokens per second and the time to the first token of each offer, beside eager float32's."""
    there = replace(machine(), cpu_features=features)
    flops = dict.fromkeys(("float32", "float16", "int8", "fp8"), roofs[1])
    found = advise(Question("model", SMOL, SMOL.task, there, Roofs(CPU, 2**35, roofs[0], flops), work, here=False))  # type: ignore[arg-type]
    seen = {row.name: row.expected for row in found.rows if row.expected}
    eager = seen["torch float32"]
    return {name: (one.tokens_per_s / eager.tokens_per_s, eager.ttft_s / one.ttft_s) for name, one in seen.items()}


def test_what_is_expected_of_openvino_is_what_was_measured_with_and_without_vnni() -> None:
    """Of benchmarks/README.md, SmolLM2-135M: batch 1, batch 8, the first token behind a prompt of 512."""
    avx2, vnni = frozenset({"avx2"}), frozenset({"avx2", "avx512f", "avx512_vnni"})
    for features, roofs, measured in ((avx2, AVX2, (3.9, 2.6, 0.50)), (vnni, VNNI_ONES, (4.4, 4.2, 2.0))):
        one, eight = (ratios(features, roofs, Asked(16, 64, batch))["openvino int8"][0] for batch in (1, 8))
        first = ratios(features, roofs, Asked(512, 16, 1))["openvino int8"][1]
        assert (one, eight, first) == pytest.approx(measured, rel=0.2), features
        genai = ratios(features, roofs, Asked(512, 16, 1))["onnxruntime-genai int8"][1]
        assert genai == pytest.approx({avx2: 0.93, vnni: 1.3}[features], rel=0.15)
        assert not {"openvino int8"} & {row.name for row in asked(SMOL, machine()).rows if "assumed" in row.offer.reach.source}


def test_torchscript_is_offered_in_int8_beside_float_on_cpus() -> None:
    """Its graphs have torch-dynamic's products without transformers' modules around them."""
    rows = {row.name: row for row in asked(SMALL, replace(machine(), cpu_features=frozenset({"avx2"}))).rows}
    traced, layers, whole = (rows[name].expected for name in ("torchscript int8", "torch-dynamic on int8", "torchscript float32"))
    assert traced and layers and whole
    assert traced.tokens_per_s > 1.1 * layers.tokens_per_s and traced.tokens_per_s > whole.tokens_per_s
    assert traced.loss == layers.loss > 0.008
    assert rows["torchscript int8"].serve.model_dump()["precision"] == "int8"


def test_another_machine_is_this_one_with_what_is_said_otherwise() -> None:
    there = described(machine(16), gpus=2, gpu_gib=80, capability=(9, 0), gib=512)
    assert (len(there.gpus), there.gpus[0].memory_bytes, there.memory_bytes) == (2, 80 * 2**30, 512 * 2**30)
    assert described(machine(16), None, None, None, None) == machine(16)
    assert described(machine(16, 1), gpus=0, gpu_gib=None, capability=None, gib=None).gpus == ()
    assert card_of(there.gpus[0]) == "H100" and card_of(Gpu("NVIDIA A100-SXM4-80GB", 1, (8, 0))) == "A100"
    assert card_of(Gpu("", 1, (7, 5))) == "T4" and card_of(Gpu("", 1, (8, 7))) == "A10"


def test_every_offer_is_a_recipe_of_its_engine() -> None:
    """On every device: what is offered is validated as a recipe's own words."""
    for there in (machine(), machine(64, 2, 80, (9, 0)), machine(64, 1, 16, (7, 5))):
        advice = asked(SMALL, there)
        assert {row.engine for row in advice.rows} >= {"torch", "ctranslate2", "vllm", "onnxruntime-genai"}
        assert all(row.serve.engine == row.engine and row.offer.reach.source for row in advice.rows)
        assert len({row.name for row in advice.rows}) == len(advice.rows)


def test_a_method_of_hours_is_left_to_recipes_that_ask_for_it() -> None:
    """Where others that read text take minutes; of a small model it is advised."""
    long, short = (
        {row.quantize.method for row in asked(facts, machine(gib=256)).rows if row.quantize}
        for facts in (EIGHT, llama(6, 288, 768, 6, 6))
    )
    assert "autoround" in short and "autoround" not in long and "awq" in long
