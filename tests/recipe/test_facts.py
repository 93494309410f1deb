"""A plan that knows its checkpoint: what only the folder tells is refused before anything runs, in the words of the stage."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

from featherweight.checkpoint.facts import facts_for_any_task
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError, RecipeError
from featherweight.grid import GRIDS
from featherweight.model.facts import CONV1D, CheckpointFacts, TokenizerFacts, Values
from featherweight.recipe.facts import Facts
from featherweight.recipe.plan import expand
from featherweight.recipe.recipe import Recipe
from featherweight.system.machine import Machine
from tests.support import headers

pytestmark = pytest.mark.slow

LLAMA: dict[str, Any] = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96, "max_position_embeddings": 512},
    **{"attention_bias": False, "mlp_bias": False, "head_dim": 16, "is_encoder_decoder": False, "pad_token_id": None},
}
MACHINE = Machine("Linux", "x86_64", "some", frozenset({"avx2", "avx512f", "avx512_vnni"}), 2, 2, 2**33, ())


def facts(config: dict[str, Any] | None = None, **told: Any) -> CheckpointFacts:
    """Those of a Llama with these changes to its configuration."""
    values = LLAMA | (config or {})
    kind = {"gpt2": "GPT2Config", "mistral": "MistralConfig"}.get(values["model_type"], "LlamaConfig")
    shapes = {f"model.layers.{layer}.mlp.down_proj.weight": (64, values["intermediate_size"]) for layer in (0, 1)}
    generation = Values({"values": told.pop("generation", {}), "names": {}})
    return CheckpointFacts(Values({"values": values, "names": {}, "class": kind}), generation, shapes, **told)


def recipe(serve: dict[str, Any], workload: dict[str, Any] | None = None, **stages: Any) -> Recipe:
    """One way to serve the checkpoint, behind the stages given."""
    engine = "compile" if serve["engine"] in ("onnxruntime-genai", "torch-compile") else "export"
    return Recipe.model_validate(
        {
            "name": "try",
            "checkpoint": {"source": "here"},
            "data": {"source": "text"},
            "stages": {engine: {"served": serve}, **{stage: {"made": spec} for stage, spec in stages.items()}},
            "variants": [{"serve": "served", **dict.fromkeys(stages, "made")}],
            "workload": workload or {},
            "promote": {"model": "try"},
        }
    )


def ruled_out(known: CheckpointFacts | None, wanted: Recipe) -> str | None:
    """Why the plan has no variant; None where it has one."""
    try:
        expand(wanted, MACHINE, Facts({"here": known} if known else {}))
    except RecipeError as error:
        return str(error)
    return None


WINDOW = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 160}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
SILU = {"hidden_act": "silu"}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}


@pytest.mark.parametrize(
    ("known", "serve", "stages", "reason"),
    [
        (facts(WINDOW), {"engine": "ctranslate2"}, {}, "does not compute mistral's sliding window of 160 tokens, and 512 are"),
        (facts(WINDOW), {"engine": "onnxruntime-genai"}, {}, "overlooks mistral's sliding window of 160"),
        (facts(DYNAMIC), {"engine": "torch-compile"}, {}, "depend on the length (dynamic); take ctranslate2"),
        (facts({"head_dim": 12}), {"engine": "onnxruntime-genai"}, {}, "a multiple of 16 channels, these have 12"),
        (facts(GPT2), {"engine": "onnxruntime-genai"}, {}, "does not know GPT2LMHeadModel; take ctranslate2"),
        (facts({"model_type": "xglm"}), {"engine": "torch"}, {}, None),
        (facts(generation={"num_beams": 1, "guidance_scale": 2.0}), {"engine": "ctranslate2"}, {}, "not follow guidance_scale"),
        (facts(generation={"guidance_scale": 2.0}), {"engine": "ctranslate2"}, {"prune": {"ratio": 0.5}}, "guidance_scale"),
        (
            facts(generation={"repetition_penalty": 1.1}, opened=TokenizerFacts(lead=())),
            {"engine": "ctranslate2"},
            {},
            "does not count a prompt's first token",
        ),
        (facts(generation={"repetition_penalty": 1.1}, opened=TokenizerFacts(lead=(1,))), {"engine": "ctranslate2"}, {}, None),
        (facts(generation={"repetition_penalty": 1.1}), {"engine": "ctranslate2"}, {}, None),
        (
            facts(generation={"num_beams": 4, "no_repeat_ngram_size": 3}),
            {"engine": "ctranslate2"},
            {},
            "weighs them otherwise than transformers does under no_repeat_ngram_size",
        ),
        (facts(generation={"num_beams": 4, "min_length": 9}), {"engine": "ctranslate2"}, {}, "under min_length"),
        (facts(generation={"num_beams": 4, "eos_token_id": [1, 2]}), {"engine": "ctranslate2"}, {}, "under several ends"),
        (
            facts(generation={"num_beams": 4, "eos_token_id": 1, "bad_words_ids": [[7]], "pad_token_id": 7}),
            {"engine": "ctranslate2"},
            {},
            None,
        ),
        (facts(generation={"num_beams": 4, "no_repeat_ngram_size": 3}), {"engine": "torch"}, {}, None),
        (facts(GPT2), {"engine": "vllm", "compute_type": "int8"}, {}, "a gpt2's are Conv1D"),
        (facts({"intermediate_size": 88}), {"engine": "vllm", "compute_type": "w4a16"}, {}, "has 88 columns, and int4-g32"),
        (facts(GPT2), {"engine": "torch"}, {"quantize": {"method": "gptq"}}, "those of a 'gpt2' model are Conv1D"),
        (facts(), {"engine": "torch"}, {"prune": {"method": "attention", "kv_heads": 3}}, "give one of 1, 2"),
        (facts(), {"engine": "torch"}, {"prune": {"method": "depth", "layers": 5}}, "5 layers to keep of 2"),
        (facts(), {"engine": "torch"}, {"prune": {"method": "width", "hidden": 64}}, "removes nothing from the hidden size of 64"),
        (facts({"intermediate_size": 90}), {"engine": "torch"}, {"prune": {"method": "sparse", "pattern": "2:4"}}, "90 weights"),
        (facts({"model_type": "phi"}), {"engine": "torch"}, {"prune": {}}, "the structure of a 'phi' model is not known"),
        (facts(), {"engine": "torch"}, {"prune": {"samples": 2, "sequence": 999}}, "prune.sequence 999 is longer"),
        (facts(), {"engine": "torch"}, {"distill": {"layers": 3}}, "3 layers asked of a teacher with 2"),
        (facts(sparse=True), {"engine": "torch"}, {"quantize": {"method": "gptq"}}, "fills the zeros"),
        (facts(), {"engine": "ctranslate2"}, {"prune": {"ratio": 0.5}}, None),
    ],
)
def test_what_only_the_folder_tells_is_refused_in_the_plan(
    known: CheckpointFacts, serve: dict[str, Any], stages: dict[str, Any], reason: str | None
) -> None:
    if "quantize" in stages:
        serve = {"engine": "torchao-int8"}
    wanted = recipe(serve, **stages)
    found = ruled_out(known, wanted)
    assert found is None if reason is None else reason in str(found)
    assert ruled_out(None, wanted) is None


def test_what_is_advised_instead_is_not_ruled_out_too() -> None:
    """llama.cpp's refusals named GenAI, whatever that said of the same model."""
    narrow = facts({"attention_bias": True, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 12, **SILU})
    reason = str(ruled_out(narrow, recipe({"engine": "llama.cpp"})))
    assert "llama.cpp's qwen3 computes with attention_bias False alone, and this model's is True; take " in reason
    assert "onnxruntime-genai" not in reason


def test_a_workload_beyond_the_context_is_refused_before_anything_runs() -> None:
    wanted = recipe({"engine": "torch"}, {"prompt_tokens": 500, "new_tokens": 64})
    assert "make 564 tokens, but the model's context holds 512" in str(ruled_out(facts(), wanted))
    longer = recipe({"engine": "torch"}, {"prompt_tokens": 400, "changed_answers": {"new_tokens": 164}})
    assert "make 564 tokens, but the model's context holds 512" in str(ruled_out(facts(), longer))


def test_a_checkpoint_that_came_quantized_is_not_quantized_again_and_is_served_on_its_own_grid() -> None:
    names = ("blk.0.attn_q.weight", "token_embd.weight")
    kept = facts(quantized="gguf", grids=dict.fromkeys(names, GRIDS["int8-g32"]))
    assert "leave the quantize stage out" in str(ruled_out(kept, recipe({"engine": "torchao-int8"}, quantize={})))
    assert "int8-g32 + ctranslate2: CTranslate2 packs one scale per row" in str(
        ruled_out(kept, recipe({"engine": "ctranslate2", "compute_type": "int8"}))
    )
    assert ruled_out(kept, recipe({"engine": "onnxruntime-genai", "precision": "int8"})) is None
    assert ruled_out(kept, recipe({"engine": "torch"}, prune={"ratio": 0.5})) is None


def test_a_student_that_is_pruned_is_judged_by_its_kind_and_not_by_the_sizes_it_had() -> None:
    wide = facts({"intermediate_size": 88, "head_dim": 32})
    wanted = recipe({"engine": "vllm", "compute_type": "w4a16"}, prune={"ratio": 0.5})
    assert "88 columns" in str(ruled_out(wide, recipe({"engine": "vllm", "compute_type": "w4a16"})))
    assert ruled_out(wide, wanted) is None
    assert ruled_out(dataclasses.replace(wide, shapes=None), recipe({"engine": "vllm", "compute_type": "w4a16"})) is None


def write_folder(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Path:
    """A checkpoint as far as a plan reads it: its weights are all zeros."""
    folder.mkdir()
    headers.safetensors(folder / "model.safetensors", shapes)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(headers.TOKENIZER))
    return folder


def test_the_folder_is_read_as_transformers_reads_it_and_torch_stays_out(tmp_path: Path) -> None:
    """What config.json leaves out, renames or derives is known: Qwen 2's window, of the upper layers alone."""
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 4, "use_sliding_window": True, "sliding_window": 48, "max_window_layers": 2}
    config |= {"intermediate_size": 96, "vocab_size": 64}
    shapes = headers.of_a_llama(config)
    for name, layer in itertools.product("qkv", range(4)):
        part, rows = f"model.layers.{layer}.self_attn.{name}_proj", 64 if name == "q" else 32 * 16
        shapes |= {f"{part}.weight": (rows, 64), f"{part}.bias": (rows,)}
    folder = write_folder(tmp_path / "qwen", config, shapes)
    asked = (
        "import sys\nfrom featherweight.checkpoint.facts import read_facts\nfrom featherweight.checkpoint.spec import LoadSpec\n"
        "from featherweight.model.positions import sliding_window\n"
        f"facts = read_facts(LoadSpec(source={str(folder)!r}))\n"
        "print([facts.config_class, sliding_window(facts.config), facts.config.num_key_value_heads, facts.parameters])\n"
        "print(len(facts.rows_and_columns), {'torch', 'transformers'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == [f"['Qwen2Config', 48, 32, {sum(map(prod, shapes.values()))}]", "28 set()"]


def test_the_last_norm_is_looked_at_as_the_others_are(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", LLAMA, {"model.layers.0.mlp.up_proj.weight": (96, 64), "model.norm.weight": (32,)})
    with pytest.raises(CheckpointError, match=r"tensor model.norm.weight has shape \[32\], but config.json asks for \[64\]"):
        facts_for_any_task(LoadSpec(source=str(folder)))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "names no model_type"),
        ({"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}, "wants code of its own"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "aqlm"}},
            r"quant_method .aqlm., and the weights are floats",
        ),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 5}}, "of 5 bits are not read here"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_the_plan(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "odd", config, {"a.0.weight": (2, 2)})
    asked = recipe({"engine": "torch"}).model_copy()
    wanted = asked.model_copy(update={"checkpoint": asked.checkpoint.model_copy(update={"source": str(folder)})})
    with pytest.raises(CheckpointError, match=reason):
        Facts.read(wanted)


def test_a_truncated_file_is_seen_by_its_header(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "cut", {"model_type": "llama"}, {"a.0.weight": (8, 8)})
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    asked = recipe({"engine": "torch"})
    wanted = asked.model_copy(update={"checkpoint": asked.checkpoint.model_copy(update={"source": str(folder)})})
    with pytest.raises(CheckpointError, match="is truncated"):
        Facts.read(wanted)


def test_the_model_types_of_conv1d_are_those_of_transformers() -> None:
    import transformers

    models = Path(transformers.__file__).parent / "models"
    named = re.compile(r"import.*\bConv1D\b|^from.*Conv1D", re.MULTILINE)
    using = (path for path in models.glob("*/modeling_*.py") if named.search(path.read_text()))
    names = {path.stem.removeprefix("modeling_") for path in using} - {"clvp"}
    assert {name.replace("openai", "openai-gpt") for name in names} == set(CONV1D)


def test_a_llama_that_is_trained_from_nothing_is_judged_by_its_spec() -> None:
    keys = {"hidden_size": 96, "heads": 4, "kv_heads": 2, "layers": 3, "vocab_size": 512}
    asked = recipe({"engine": "onnxruntime-genai"}).model_dump(exclude_none=True)
    wanted = Recipe.model_validate(asked | {"checkpoint": {"train": keys}})
    with pytest.raises(RecipeError, match="a multiple of 16 channels, these have 24"):
        expand(wanted, MACHINE, Facts.read(wanted))
    assert Facts.read(wanted).size(wanted).parameters > 512 * 96
    odd = Recipe.model_validate(asked | {"checkpoint": {"train": keys | {"kv_heads": 3}}})
    with pytest.raises(RecipeError, match="heads 4 must be a multiple of kv_heads 3"):
        expand(odd, MACHINE)


def test_engines_are_held_to_the_grid_that_a_packed_checkpoint_came_with(tmp_path: Path) -> None:
    packed = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    tensors = headers.of_a_llama(LLAMA)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.qweight": (8, 96), f"{name}.qzeros": (2, 12), f"{name}.scales": (2, 96)}
    folder = write_folder(tmp_path / "packed", LLAMA | {"quantization_config": packed}, tensors)
    known = facts_for_any_task(LoadSpec(source=str(folder)))
    assert "CTranslate2 packs int8 and float only" in str(
        ruled_out(known, recipe({"engine": "ctranslate2", "compute_type": "int8"}))
    )
    assert "leave the quantize stage out" in str(ruled_out(known, recipe({"engine": "torchao-int4"}, quantize={})))
    assert ruled_out(known, recipe({"engine": "torchao-int4"})) is None
