"""Recipes are strict, and say what is wrong in one line."""

import time
from pathlib import Path

import pytest
import yaml

from featherweight.distillation.spec import DistillSpec
from featherweight.errors import RecipeError
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.reading import load_recipe
from featherweight.recipe.recipe import Recipe
from tests.support.serving_models import serving_spec

MINIMAL = {
    "name": "x",
    "checkpoint": {"source": "folder"},
    "data": {"source": "text.txt"},
    "promote": {"model": "x"},
}


@pytest.fixture
def write(tmp_path: Path):
    def _write(**changes: object) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
        return path

    return _write


def test_a_minimal_recipe_is_valid_and_frozen(write) -> None:
    recipe = load_recipe(write())
    assert recipe.workload.batch_sizes == (1, 8)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_one_may_stand_where_several_may(write) -> None:
    workload = load_recipe(write(workload={"threads": 2, "batch_sizes": 1, "lengths": {"prompt_tokens": 100}})).workload
    assert (workload.threads, workload.batch_sizes) == ((2,), (1,))
    assert [one.prompt_tokens for one in workload.lengths] == [100]
    assert load_recipe(write(workload={"lengths": 128})).workload.long_prompts[0].prompt_tokens == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constrains": {}}, "unknown key 'constrains'; did you mean 'constraints'"),
        ({"stages": {"quantise": {}}}, "did you mean 'quantize'"),
        ({"stages": {"quantize": {"a": {"metod": "rtn"}}}}, "unknown key 'stages.quantize.a.metod'; did you mean 'method'"),
        ({"stages": {"prune": {"p": {"finetune": {"step": 3}}}}}, "did you mean 'steps'"),
        (
            {"stages": {"compile": {"a": {"engine": "llama.cpp", "precision": "int8"}}}},
            "llama.cpp is made by export, not by compile",
        ),
        ({"stages": {"export": {"a": {"engine": "nosuch", "precision": "int8"}}}}, "unknown engine 'nosuch'"),
        ({"stages": {"export": {"a": {"precision": "int8"}}}}, "stages.export.a.engine: Field required"),
        ({"stages": {"quantize": "rtn"}}, "stages.quantize: must have keys of its own, not be 'rtn'"),
        ({"stages": {"quantize": {"a": "rtn"}}}, "stages.quantize.a: must have keys of its own (method, "),
        ({"variants": "a"}, "variants: must be a list, such as [a, b], not 'a'"),
        ({"workload": {"batch_sizes": True}}, "workload.batch_sizes: must be a list, such as [a, b], not True"),
        ({"checkpoint": {}}, "exactly one of 'source' and 'train'"),
        ({"objective": "fast"}, "objective: "),
        ({"stages": {"quantize": {"a": {}}, "prune": {"a": {}}}}, "recipe.yaml: the name 'a' stands twice"),
        ({"stages": {"quantize": {"none": {}}}}, "'none' is reserved"),
        ({"stages": {"quantize": {"A B": {}}}}, "stages.quantize.A B"),
        ({"stages": {"distill": {"a": {"layers": 1, "sequence": 1}}}}, "a.sequence: Input should be greater"),
        ({"stages": {"prune": {"a": {"sequence": 1}}}}, "a.sequence: Input should be greater"),
        (
            {"stages": {"prune": {"a": {"finetune": {"sequence": 1}}}}},
            "finetune.sequence: Input should be greater",
        ),
        ({"stages": {"quantize": {"a": {"sequence": 1}}}}, "a.sequence: Input should be greater"),
        ({"promote": {"model": "a/b"}}, "promote.model: 'a/b' cannot name a registered model; take letters"),
        ({"promote": {"model": ".."}}, "cannot name a registered model"),
        ({"promote": {"model": "-x"}}, "cannot name a registered model"),
        ({"promote": {"model": "a+b"}}, "cannot name a registered model"),
        ({"promote": {"model": "a "}}, "cannot name a registered model"),
        ({"promote": {"model": "a.history"}}, "'.history' ends the names of those that hold histories"),
        ({"promote": {"model": "m" * 300}}, "at most 200"),
        ({"constraints": {"min_speedup": float("nan")}}, "constraints.min_speedup: "),
        ({"constraints": {"max_quality_loss": float("inf")}}, "constraints.max_quality_loss: "),
        ({"constraints": {"min_speedup": -1}}, "constraints.min_speedup: "),
        ({"constraints": {"max_accuracy_loss": 0.01}}, "wants workload.benchmarks, such as"),
        ({"constraints": {"max_reference_loss": 0.5}}, "wants workload.references, such as"),
        ({"workload": {"references": {}}}, "workload.references: a model for text-generation makes no text of a text"),
        ({"workload": {"references": {}}, "task": "text2text-generation", "checkpoint": {"source": "x"}}, "wants data.target"),
        (
            {"constraints": {"max_accuracy_loss": 0.01}, "workload": {"benchmarks": {"piqa": {"file": "x", "limit": 193}}}},
            "takes at least 194 examples to show, even if no answer differs; set workload.benchmarks.piqa.limit to that",
        ),
        ({"objective": "speedup@4"}, "objective speedup@4 wants 4 among workload.batch_sizes, which are [1, 8]"),
        ({"objective": "ttft@512"}, "ttft@512 wants 512 among workload.lengths"),
        ({"constraints": {"max_ttft_s": {512: 0.1}}}, "constraints.max_ttft_s.512 wants 512 among workload.lengths"),
        ({"workload": {"lengths": [512, {"prompt_tokens": 512, "new_tokens": 9}]}}, "lengths: 512 tokens stand twice"),
        ({"constraints": {"max_p95_request_s": 1}}, "max_p95_request_s wants workload.requests, such as {rate: 4"),
        (
            {"constraints": {"max_p99_request_s": {2.5: 1}}, "workload": {"requests": {"rate": [1, 4], "seconds": 400}}},
            "constraints.max_p99_request_s wants 2.5 among the rates of workload.requests",
        ),
        (
            {"constraints": {"max_p99_request_s": {4: 1}}, "workload": {"requests": {"rate": [1, 4], "seconds": 90}}},
            "takes about 736 requests to show, and workload.requests has 360 at the rate 4; set workload.requests.seconds to 184",
        ),
        ({"workload": {"requests": {"rate": [4, 4.0]}}}, "rate: 4 stands twice"),
        ({"constraints": {"max_changed_answers": 0.1}}, "wants workload.changed_answers, such as"),
        (
            {"constraints": {"max_changed_answers": 0.01}, "workload": {"changed_answers": {}}},
            "takes at least 381 prompts to show, even if no answer changes",
        ),
        ({"checkpoint": {"train": {"layers": 200_000}}}, "checkpoint.train.layers: "),
        ({"workload": {"rounds": 10**18}}, "workload.rounds: "),
        ({"workload": {"window_tokens": 1}}, "window_tokens: Input should be greater"),
        ({"stages": {"quantize": {"a": {"grid": "int4g32"}}}}, "a.grid: unknown grid 'int4g32'; did you mean 'int4-g32'?"),
        ({"stages": {"quantize": {"a": {"head": "int-8"}}}}, "a.head: unknown grid 'int-8'; did you mean 'int8'?"),
        ({"stages": {"quantize": {"a": {"mixed": {"grid": "int9"}}}}}, "a.mixed.grid: unknown grid 'int9'; did you mean 'int8'?"),
    ],
)
def test_mistakes_are_named(write, changes: dict, message: str) -> None:
    refused(write(**changes), message)


@pytest.mark.parametrize(
    ("stage", "spec", "message"),
    [
        ("quantize", {"method": "qat", "grid": "fp8"}, "qat trains on integer grids"),
        ("quantize", {"method": "qat", "head": "fp8"}, "qat trains on integer grids"),
        ("quantize", {"method": "gptq", "steps": 9}, "steps plays no role with method gptq; leave it out"),
        ("quantize", {"generated_tokens": 9}, "generated_tokens plays no role with method rtn"),
        ("quantize", {"grid": "int8", "mixed": {"grid": "int4-g32"}}, "mixed.grid int4-g32 is no finer than grid int8"),
        ("quantize", {"grid": "int8-g32", "mixed": {}}, "mixed.grid int8-g32 is no finer than grid int8-g32"),
        ("distill", {"layers": 1, "layer_map": "last"}, "layer_map plays no role without hidden_weight or attention_weight"),
        ("distill", {"student": "x", "choose": "uniform"}, "choose plays no role without layers"),
        ("distill", {"layers": 1, "teacher_cache": "none", "top_k": 8}, "top_k plays no role with teacher_cache none"),
        ("distill", {"layers": 1, "hidden_weight": 1, "top_k": 8}, "top_k plays no role beside hidden_weight or attention_weight"),
        ("distill", {"layers": 1, "kl_weight": 0, "temperature": 3.0}, "temperature plays no role with kl_weight 0"),
        ("distill", {"layers": 1, "kl_weight": 0, "divergence": "reverse_kl"}, "divergence plays no role with kl_weight 0"),
        ("distill", {"layers": 1, "attention_loss": "mse"}, "attention_loss plays no role without attention_weight"),
        ("export", {"engine": "torch-dynamic", "compute_type": "int8"}, "compute_type plays no role with engine torch-dynamic"),
        ("export", {"engine": "vllm", "reduce_range": True}, "reduce_range plays no role with engine vllm"),
    ],
)
def test_what_has_no_meaning_is_named(write, stage: str, spec: dict, message: str) -> None:
    refused(write(stages={stage: {"a": spec}}), f"stages.{stage}.a: {message}")


def refused(path: Path, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dump_leaves_out_what_plays_no_role() -> None:
    for spec in (
        PruneSpec.of(method="depth", layers=2),
        PruneSpec.of(method="attention", kv_heads=1),
        DistillSpec(layers=1, kl_weight=0),
        QuantizeSpec.of(),
        serving_spec(engine="torchao-int4"),
    ):
        dump = spec.model_dump(mode="json")
        assert not dump.keys() & spec.unread.keys()
        assert type(spec).model_validate(dump) == spec


@pytest.mark.parametrize("content", ["", "- a", "a: [", "\x00\xff"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RecipeError):
        load_recipe(path)
    with pytest.raises(RecipeError, match="cannot read recipe"):
        load_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nname: y\n", "the key 'name' stands twice"),
        ("promote: {model: a, stage: none, model: b}\n", "the key 'model' stands twice"),
        ("[" * 100_000, "nested more than 50 deep"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{f'*{chr(97 + n)},' * 10}]\n" for n in range(8)),
            "aliases",
        ),
        ("a: &a [*a]\n", "aliases"),
        ("x" * 2_000_000, "at most 1000000"),
    ],
    ids=["twice", "twice inside", "deep", "laughs", "itself", "long"],
)
def test_what_would_grow_or_hide_is_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("changes", "override", "where"),
    [
        ({"checkpoint": {"source": "s3://ada:hunter2@bucket/model"}}, "seed=1", "checkpoint.source"),
        ({"data": {"source": "text", "evaluation": "s3://bucket/x?X-Amz-Signature=hunter2"}}, "seed=1", "data.evaluation"),
        ({}, "data.source=s3://key:hun/ter2@bucket", "data.source"),
        ({}, "checkpoint.base=hf:org/name?token=hunter2", "checkpoint.base"),
    ],
)
def test_a_password_in_an_address_is_refused_and_not_told(write, changes: dict, override: str, where: str) -> None:
    """What a recipe cannot hold gets into no plan, copy, tag or database."""
    with pytest.raises(RecipeError, match=f"^{where}: .* holds a password") as caught:
        load_recipe(write(**changes), (override,))
    assert "hunter2" not in str(caught.value) and "ter2" not in str(caught.value)


def test_overrides_reach_any_key(write) -> None:
    path = write()
    recipe = load_recipe(path, ("workload.batch_sizes=[2]", "objective=speedup@2", "constraints.max_quality_loss=0.02", "seed=7"))
    assert (recipe.workload.batch_sizes, recipe.constraints.max_quality_loss, recipe.seed) == ((2,), 0.02, 7)
    for wrong in ("seed", "=3", "seed.x=1", "seed={"):
        with pytest.raises(RecipeError):
            load_recipe(path, (wrong,))
    with pytest.raises(RecipeError, match="did you mean 'rounds'"):
        load_recipe(path, ("workload.round=3",))


def test_a_recipe_survives_its_own_dump() -> None:
    recipe = Recipe.model_validate(MINIMAL)
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe
