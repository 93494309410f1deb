"""The plan is a trie: prefixes are shared, the impossible is ruled out before anything runs."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.errors import RecipeError
from featherweight.recipe.cost import Speeds, estimate
from featherweight.recipe.plan import Plan, expand
from featherweight.recipe.recipe import Recipe, VariantsSpec
from featherweight.spec import ModelSize
from featherweight.system.machine import Machine

STAGES: dict[str, Any] = {
    "distill": {"half": {"layers": 2}},
    "prune": {"quarter": {}, "bare": {"finetune": None}},
    "quantize": {"rtn8": {}, "qat4": {"method": "qat", "grid": "int4-g32"}},
    "compile": {"ort8": {"engine": "onnxruntime-genai", "precision": "int8"}},
    "export": {"ct2-int8": {"engine": "ctranslate2", "compute_type": "int8"}, "vllm": {"engine": "vllm"}},
}


def plan_of(variants: list[dict[str, Any]] | None = None, stages: dict[str, Any] = STAGES) -> tuple[Recipe, Plan]:
    tree = {"name": "t", "checkpoint": {"train": {}}, "data": {"source": "x"}, "promote": {"model": "t"}}
    recipe = Recipe.model_validate({**tree, "stages": stages, "variants": variants})
    return recipe, expand(recipe)


def test_prefixes_are_shared() -> None:
    _, plan = plan_of([{"distill": "half", "prune": "quarter", "quantize": ["none", "rtn8"], "serve": ["ort8", "ct2-int8"]}])
    assert [v.name for v in plan.variants[1:]] == [
        "half/quarter/ort8",
        "half/quarter/ct2-int8",
        "half/quarter/rtn8/ort8",
        "half/quarter/rtn8/ct2-int8",
    ]
    stages = [node.stage for node in plan.nodes.values()]
    counts = [stages.count(stage) for stage in ("distill", "prune", "finetune", "quantize")]
    assert counts == [1, 1, 1, 1]
    assert plan.nodes["half/quarter/rtn8"].inputs["checkpoint"] == "half/quarter+finetune"
    assert plan.nodes["half/quarter+finetune"].inputs["checkpoint"] == "half/quarter"


def test_a_plan_ends_in_the_choice_the_registration_and_the_promotion() -> None:
    recipe, plan = plan_of([{"quantize": ["none", "rtn8"], "serve": "ct2-int8"}])
    *made, decide, register, promote = plan.nodes.values()
    assert [node.stage for node in (decide, register, promote)] == ["decide", "register", "promote"]
    names = ["baseline", "ct2-int8", "rtn8/ct2-int8"]
    assert decide.inputs == {name: f"{name}/evaluate" for name in names}
    assert decide.spec.model_dump()["variants"] == tuple(names)
    assert set(register.inputs.values()) == {"decide", *(node.id for node in made)}
    nodes = register.spec.model_dump()["nodes"]
    assert nodes == {variant.name: (variant.served, variant.measured) for variant in plan.variants}
    assert (promote.spec, promote.inputs) == (recipe.promote, {"registered": "register"})
    costs = estimate(plan, {}, set())
    assert all(costs[id].seconds > 0 for id in ("decide", "register", "promote"))


@pytest.mark.parametrize("name", ["decide", "register", "promote"])
def test_their_names_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=f"the name '{name}' is reserved"):
        plan_of(stages={"export": {name: {"engine": "ctranslate2"}}})


def test_finetune_can_be_left_out() -> None:
    _, plan = plan_of([{"prune": "bare", "serve": "ort8"}])
    assert plan.nodes["bare/ort8"].inputs["checkpoint"] == "bare"


def test_the_impossible_is_ruled_out_with_its_reason() -> None:
    _, plan = plan_of([{"quantize": "qat4", "serve": "*"}, {"serve": "vllm"}])
    assert "qat4/ct2-int8" in plan.ruled_out
    assert "CTranslate2" in plan.ruled_out["qat4/ct2-int8"]
    assert not any(name.startswith("qat4/ct2") for name in plan.nodes)


@pytest.mark.parametrize(
    ("task", "distill", "reason"),
    [
        ("text-generation", {"prune": {"scope": "global"}}, "prune.scope global + vllm"),
        ("fill-mask", {"layers": 2, "sequence_level": {}}, "fill-mask + distill.sequence_level: an encoder fills in masks"),
    ],
)
def test_what_a_distillation_asks_for_can_rule_it_out(task: str, distill: dict[str, Any], reason: str) -> None:
    tree = {"name": "t", "task": task, "checkpoint": {"source": "x"}, "data": {"source": "x"}, "promote": {"model": "t"}}
    stages = {"distill": {"small": distill}, "export": {"e": {"engine": "vllm" if task == "text-generation" else "torch-dynamic"}}}
    with pytest.raises(RecipeError, match=re.escape(reason)):
        expand(Recipe.model_validate({**tree, "stages": stages, "variants": [{"distill": "small"}]}))


def test_what_fills_zeros_does_not_follow_a_sparse_student() -> None:
    tree = {"name": "t", "checkpoint": {"source": "x"}, "data": {"source": "x"}, "promote": {"model": "t"}}
    methods = {method: {"method": method} for method in ("gptq", "rtn")}
    stages = {
        "distill": {"thin": {"prune": {"method": "sparse"}}},
        "quantize": methods,
        "export": {"ct2": {"engine": "ctranslate2", "compute_type": "int8"}},
    }
    plan = expand(Recipe.model_validate({**tree, "stages": stages, "variants": [{"distill": "thin", "quantize": "*"}]}))
    assert list(plan.ruled_out) == ["thin/gptq/ct2"] and "fills the zeros" in plan.ruled_out["thin/gptq/ct2"]


def test_adapters_stay_beside_what_is_neither_cut_nor_served_by_an_engine_that_takes_none() -> None:
    tree = {"name": "t", "data": {"source": "x"}, "promote": {"model": "t"}}
    stages = {
        "prune": {"cut": {"ratio": 0.5}},
        "export": {
            "gguf": {"engine": "llama.cpp", "precision": "int8"},
            "plain": {"engine": "torch"},
            "ct2": {"engine": "ctranslate2"},
        },
    }
    adapted = {**tree, "checkpoint": {"source": "x", "adapters": {"fr": "y"}}, "stages": stages}
    ruled_out = expand(Recipe.model_validate({**adapted, "variants": [{}, {"prune": "cut"}]})).ruled_out
    assert sorted(ruled_out) == ["ct2", "cut/ct2", "cut/gguf", "cut/plain"]
    assert re.fullmatch(
        "checkpoint.adapters \\+ ctranslate2: it serves one model, with no adapters beside it; take (llama.cpp or )?torch, "
        "or merge one: its folder is the source",
        ruled_out["ct2"],
    )
    assert ruled_out["cut/gguf"] == (
        "checkpoint.adapters + prune: they fit the checkpoint as it is; merge one: its folder is the source"
    )
    with pytest.raises(ValueError, match="are kept beside decoders alone, not for fill-mask; merge one: its folder is the source"):
        Recipe.model_validate({**adapted, "task": "fill-mask"})


def test_only_impossible_combinations_are_an_error() -> None:
    with pytest.raises(RecipeError, match="every combination is impossible"):
        plan_of([{"quantize": "qat4", "serve": "ct2-int8"}])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RecipeError, match="'fourth' names no alternative of prune"):
        plan_of([{"prune": "fourth"}])


def test_no_variants_section_means_every_combination() -> None:
    _, plan = plan_of()
    assert len(plan.variants) - 1 + len(plan.ruled_out) == 2 * 3 * 3 * 3


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "distill": st.sampled_from(["none", "half", "*"]),
                "prune": st.sampled_from(["none", "quarter", "bare", "*"]),
                "quantize": st.sampled_from(["none", "rtn8", "qat4", "*"]),
                "serve": st.sampled_from(["ort8", "vllm", "*", "ct2-*"]),
            },
        ),
        min_size=1,
        max_size=4,
    )
)
def test_every_plan_is_in_order_and_every_variant_reaches_the_checkpoint(lines: list[dict[str, Any]]) -> None:
    try:
        _, plan = plan_of(lines)
    except RecipeError as error:
        assert "impossible" in str(error)
        return
    seen: set[str] = set()
    for node in plan.nodes.values():
        assert set(node.inputs.values()) <= seen
        seen.add(node.id)
    for variant in plan.variants:
        path = plan.path(variant.measured)
        assert {"checkpoint", "text/evaluation", variant.served} <= set(path)
    costs = estimate(plan, {}, set())
    assert all(cost.seconds >= 0 for cost in costs.values())
    assert len({v.name for v in plan.variants}) == len(plan.variants)


@pytest.mark.parametrize(("task", "left"), [("text2text-generation", {"ct2-int8"}), ("fill-mask", {"inductor"})])
def test_engines_without_a_place_for_the_task_are_ruled_out(task: str, left: set[str]) -> None:
    tree = {"name": "t", "checkpoint": {"source": "x"}, "data": {"source": "x"}, "promote": {"model": "t"}}
    stages = {**STAGES, "compile": STAGES["compile"] | {"inductor": {"engine": "torch-compile"}}}
    plan = expand(Recipe.model_validate({**tree, "task": task, "stages": stages, "variants": [{"serve": "*"}]}))
    assert {variant.name for variant in plan.variants} == left | {"baseline"}
    assert plan.ruled_out["vllm"].startswith(f"{task} + vllm: ")
    assert plan.nodes["checkpoint"].spec.model_dump()["task"] == task
    with pytest.raises(ValueError, match=f"makes a Llama, which is no model for {task}"):
        Recipe.model_validate({**tree, "task": task, "checkpoint": {"train": {}}})


@pytest.mark.parametrize(("features", "left"), [({"avx2"}, ["baseline", "w8"]), ({"avx2", "avx512f"}, ["baseline", "w4", "w8"])])
def test_a_plan_can_be_made_for_another_machine(features: set[str], left: list[str]) -> None:
    other = Machine("Linux", "x86_64", "some", frozenset(features), 2, 2, 2**33, ())
    exports = {"w4": {"engine": "vllm", "compute_type": "w4a16"}, "w8": {"engine": "vllm", "compute_type": "w8a8"}}
    recipe, _ = plan_of([{"serve": "vllm"}], STAGES | {"export": STAGES["export"] | exports})
    wanted = recipe.model_copy(update={"variants": (VariantsSpec(serve=("w4", "w8")),)})
    assert [variant.name for variant in expand(wanted, other).variants] == left


NGRAM = {"engine": "llama.cpp", "speculation": {"method": "ngram"}}


def test_speculation_is_tried_beside_the_same_without_it() -> None:
    plain, half = {"engine": "llama.cpp"}, {**NGRAM, "precision": "float16"}
    _, plan = plan_of(stages={"export": {"ngram": NGRAM, "plain": plain, "ngram16": half}})
    assert [variant.name for variant in plan.variants] == ["baseline", "ngram", "plain"]
    assert plan.ruled_out["ngram16"].startswith("speculation: the same without it is no variant of this recipe")
    assert plan.nodes["ngram/evaluate"].engines == ("llama.cpp", "llama.cpp", "torch")
    assert plan.nodes["plain/evaluate"].engines == ("llama.cpp", "torch")
    costs = estimate(plan, {}, set(), ModelSize(10**8), Speeds(1e11, 1e10))
    assert costs["ngram/evaluate"].seconds > costs["plain/evaluate"].seconds


def drafted(draft: str = "half/f16") -> Plan:
    plain = {"engine": "llama.cpp"}
    guess = {**plain, "speculation": {"method": "draft", "draft": draft}}
    export = {"guess": guess, "plain": plain, "f16": {**plain, "precision": "float16"}, "ct2": {"engine": "ctranslate2"}}
    lines = [{"serve": ["guess", "plain"]}, {"distill": "half", "serve": ["f16", "ct2"]}, {"prune": "trim", "serve": "f16"}]
    stages = {"distill": {"half": {"layers": 2}}, "prune": {"trim": {"method": "vocabulary", "finetune": None}}, "export": export}
    return plan_of(lines, stages)[1]


def test_a_draft_is_another_variant_that_is_made_first() -> None:
    plan = drafted()
    assert plan.nodes["guess"].inputs["draft"] == "half/f16" and not plan.ruled_out
    order = list(plan.nodes)
    assert order.index("half/f16") < order.index("guess") and {"half", "half/f16"} <= set(plan.path("guess/evaluate"))


@pytest.mark.parametrize(
    ("draft", "told"),
    [
        ("half/f15", "'half/f15' is no variant of this recipe; did you mean 'half/f16'"),
        ("half/ct2", "half/ct2 is served by ctranslate2, and drafts for llama.cpp come of llama.cpp"),
        ("guess", "guess has speculation itself; name one that has none"),
        ("trim/f16", "trim/f16 has other tokens than what it is to draft for; name one with the same tokenizer"),
    ],
)
def test_what_is_no_draft_is_refused(draft: str, told: str) -> None:
    assert told in drafted(draft).ruled_out["guess"]


def test_an_engine_without_speculation_is_refused_with_the_way_out() -> None:
    """Engines that have it are named where they are installed."""
    spec = {"engine": "ctranslate2", "speculation": "ngram"}
    _, plan = plan_of(stages={"export": {"ct2": {"engine": "ctranslate2"}, "guess": spec}})
    reason = "speculation + ctranslate2: ctranslate2 writes one token a pass here, and not by ngram; "
    assert plan.ruled_out["guess"].startswith(reason) and plan.ruled_out["guess"].endswith("leave it out")
