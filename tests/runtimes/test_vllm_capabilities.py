"""vLLM on GPUs: rules by compute capability, held to its source where that is installed, and plans for described machines."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from featherweight.grid import GRIDS
from featherweight.recipe.plan import expand
from featherweight.recipe.recipe import Recipe
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Limits
from featherweight.runtimes.vllm import capabilities, parallel, server
from featherweight.runtimes.vllm.capabilities import FP8_CACHE, RULES, rule
from featherweight.runtimes.vllm.loaded import VllmModel
from featherweight.system import toolchains
from featherweight.system.machine import Gpu, Machine
from tests.support.paths import ROOT
from tests.support.serving_models import serving_spec

GENERATIONS = {
    "sm_75": (7, 5),
    "sm_80": (8, 0),
    "sm_86": (8, 6),
    "sm_89": (8, 9),
    "sm_90": (9, 0),
    "sm_100": (10, 0),
    "sm_120": (12, 0),
}
EVERYWHERE = dict.fromkeys(GENERATIONS, "runs")
EXPECTED = {
    "float32": EVERYWHERE,
    "float16": EVERYWHERE,
    "bfloat16": EVERYWHERE | {"sm_75": "refused"},
    "int8": EVERYWHERE,
    "w8a16": EVERYWHERE,
    "w4a16": EVERYWHERE,
    "fp8": EVERYWHERE | dict.fromkeys(("sm_75", "sm_80", "sm_86"), "emulated"),
    FP8_CACHE: EVERYWHERE | {"sm_75": "refused", "sm_80": "emulated", "sm_86": "emulated"},
    capabilities.AWQ: EVERYWHERE,
    capabilities.GPTQ: EVERYWHERE,
    capabilities.BITSANDBYTES: dict.fromkeys(GENERATIONS, "refused"),
}


def machine(*capability: tuple[int, int] | None) -> Machine:
    """A machine with a GPU of each capability."""
    return Machine("Linux", "x86_64", "some", frozenset(), 2, 2, 2**35, tuple(Gpu("some", 2**34, one) for one in capability))


def refusal(where: Machine, **keys):
    return RUNTIMES["vllm"].machine_refusal(serving_spec("vllm", **keys), where)


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("what", RULES)
def test_every_format_on_every_generation(what, name):
    assert rule(what, GENERATIONS[name]).verdict == EXPECTED[what][name]
    if what in ("float32", "float16", "bfloat16", "int8", "w8a16", "w4a16", "fp8"):
        refused = refusal(machine(GENERATIONS[name]), compute_type=what)
        assert bool(refused) == (EXPECTED[what][name] == "refused") and (not refused or f"serves no {what} on {name}: " in refused)


@pytest.mark.parametrize("what", RULES)
def test_nothing_runs_before_turing_and_the_unknown_is_let_through(what):
    assert "Turing" in rule(what, (7, 0)).how
    assert refusal(machine((7, 0))) and not refusal(machine(None))


def test_the_oldest_of_several_gpus_decides():
    assert "leave kv_cache out" in refusal(machine((9, 0), (7, 5)), kv_cache="fp8")
    assert refusal(machine((9, 0), (8, 0)), kv_cache="fp8") is None


def test_narrow_heads_have_no_fp8_cache_before_ada():
    for width, capability, refused in ((96, (8, 6), True), (128, (8, 6), False), (96, (8, 9), False), (96, None, False)):
        assert bool(capabilities.heads_refusal(width, machine(capability).gpus)) is refused


def test_the_doctor_hears_what_is_emulated():
    note = RUNTIMES["vllm"].machine_note
    assert "fp8 is emulated: weights in fp8" in note(machine((8, 6)))[0]
    assert note(machine((9, 0))) is None


@pytest.mark.parametrize(("capability", "disabled"), [((9, 0), None), ((10, 0), "CutlassInt8ScaledMMLinearKernel"), (None, None)])
def test_on_blackwell_int8_goes_round_cutlass(monkeypatch, capability, disabled):
    monkeypatch.delenv("VLLM_DISABLED_KERNELS", raising=False)
    monkeypatch.setattr(server, "gpus", lambda: machine(capability).gpus)
    assert server.environment({"compute_type": "int8"}, 1).get("VLLM_DISABLED_KERNELS") == disabled
    assert "VLLM_DISABLED_KERNELS" not in server.environment({"compute_type": "fp8"}, 1)


@pytest.mark.parametrize(
    ("gpus", "size", "reason"),
    [(0, 2, "there are none"), (1, 2, "there is 1"), (2, 4, "there are 2"), (2, 2, None), (4, 2, None), (0, 1, None)],
)
def test_parts_want_a_gpu_each(gpus, size, reason):
    found = parallel.machine_refusal(size, machine(*[(9, 0)] * gpus))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("heads", "kv_heads", "inner", "size", "reason"),
    [(32, 8, 64, 8, None), (32, 8, 64, 16, None), (32, 8, 64, 3, "32 attention heads"), (36, 8, 72, 12, "neither divides 8"),
     (12, 12, 50, 4, "50 inner channels"), (9, 3, 1536, 3, None), (9, 3, 1536, 2, "9 attention heads")],
)  # fmt: skip
def test_parts_hold_whole_heads(heads, kv_heads, inner, size, reason):
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=inner)
    found = parallel.model_refusal(size, SimpleNamespace(get_text_config=lambda: config))
    assert found is None if reason is None else reason in found


def test_groups_are_not_cut_apart():
    rows = {
        "model.layers.0.mlp.down_proj.weight": (GRIDS["int4-g64"], 192),
        "model.layers.0.mlp.up_proj.weight": (GRIDS["int4-g64"], 64),
    }
    assert "groups of 64" in parallel.groups_refusal(2, rows)
    assert parallel.groups_refusal(1, rows) is None and parallel.groups_refusal(3, rows) is None
    assert parallel.groups_refusal(2, {name: (GRIDS["int4"], columns) for name, (_, columns) in rows.items()}) is None


def test_the_server_is_told_its_parts(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    engine = object.__new__(VllmModel)
    engine.weights = engine.served = tmp_path
    engine.options, engine.limits = {"tensor_parallel_size": "2"}, Limits(threads=1)
    arguments = engine._arguments(8000)
    assert arguments[arguments.index("--tensor-parallel-size") + 1] == "2"


EXPORTS = {
    "bf16": {"compute_type": "bfloat16"}, "int8": {"compute_type": "int8"}, "w4": {"compute_type": "w4a16"},
    "fp8": {"compute_type": "fp8"}, "cache": {"compute_type": "float16", "kv_cache": "fp8"},
    "two": {"compute_type": "float16", "tensor_parallel_size": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    ("where", "ruled_out"),
    [(machine((7, 5)), {"bf16", "cache", "two"}), (machine((8, 6), (8, 6)), set()), (machine((12, 0)), {"two"})],
    ids=["T4", "two A10", "RTX 5090"],
)
def test_a_plan_for_a_machine_that_is_described(where, ruled_out):
    export = {name: {"engine": "vllm", **keys} for name, keys in EXPORTS.items()}
    tree = {
        "name": "t",
        "checkpoint": {"train": {}},
        "data": {"source": "x"},
        "promote": {"model": "t"},
        "device": "cuda",
        "stages": {"export": export},
    }
    plan = expand(Recipe.model_validate(tree), replace(where, cpu_features=frozenset({"avx2"})))
    assert set(plan.ruled_out) == ruled_out
    assert {variant.name for variant in plan.variants} == {"baseline", *EXPORTS} - ruled_out


def test_the_page_says_what_the_rules_say():
    page = (ROOT / "docs" / "methods.md").read_text()
    for what in RULES:
        cells = [capabilities.rule(what, capability).verdict for capability in GENERATIONS.values()]
        assert f"| {what} | {' | '.join(cells)} |" in page, f"docs/methods.md: the line of {what} is another"


INSTALLED = next(iter((toolchains.location() / "vllm").glob("lib/python3*/site-packages/vllm")), None)


@pytest.mark.skipif(INSTALLED is None, reason="the vLLM toolchain is not installed: run 'make setup'")
def test_the_rules_are_those_of_the_installed_source():
    """Every file that a rule names is there, and the smallest capability in the schemes' files is the rule's."""
    versions = [name for name in toolchains.distributions("vllm") if re.match(r"vllm(_cpu)?-", name)]
    assert versions and capabilities.VERSION in versions[0], "read the new source, and move the rules' version on"
    for rules in RULES.values():
        for one in rules:
            named = [part.partition(":")[0].strip() for part in one.source.split(";") if "/" in part]
            assert all((INSTALLED / name).is_file() for name in named), one.source
    smallest = {"w8a8_int8": 75, "wNa16": 75, "w8a16_fp8": 75, "w8a8_fp8": 89}
    folder = INSTALLED / "model_executor/layers/quantization/compressed_tensors/schemes"
    for name, capability in smallest.items():
        text = (folder / f"compressed_tensors_{name}.py").read_text()
        assert int(re.search(r"def get_min_capability\(cls\) -> int:\s+(?:#.*\s+)*return (\d+)", text).group(1)) == capability
    methods = (INSTALLED / "model_executor/layers/quantization/__init__.py").read_text()
    assert '"awq"' in methods and "bitsandbytes" not in methods
    heads = re.search(
        r"def get_supported_head_sizes.*?return \[([\d, ]+)\]",
        (INSTALLED / "v1/attention/backends/flashinfer.py").read_text(),
        re.DOTALL,
    )
    assert tuple(map(int, heads.group(1).split(","))) == capabilities.FLASHINFER_HEADS


def test_a_model_on_one_gpu_keeps_its_digest():
    assert "tensor_parallel_size" not in serving_spec("vllm").model_dump()
    assert serving_spec("vllm", tensor_parallel_size=2).model_dump()["tensor_parallel_size"] == 2
