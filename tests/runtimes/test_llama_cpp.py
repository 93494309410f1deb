"""llama.cpp: what it refuses, GGUF files that hold our integers bit for bit, and what it computes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from typing import Any

import gguf
import pytest
import torch

from featherweight.checkpoint.gguf import convert_gguf
from featherweight.errors import RecipeError, StageError
from featherweight.grid import GRIDS
from featherweight.model.matrices import move_to_grid, round_to_nearest
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Progress
from featherweight.runtimes import parity
from featherweight.runtimes.bounds import EXACT, TABLE, Bound
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.generation_settings import GenerationSettings
from featherweight.runtimes.interface import Grids, Limits
from featherweight.runtimes.llama_cpp import library, own_kinds
from featherweight.runtimes.llama_cpp.blocks import pack
from featherweight.runtimes.llama_cpp.vocabulary import Vocabulary
from featherweight.runtimes.llama_cpp.write import packed, write_file
from featherweight.runtimes.spec import ExportSpec
from featherweight.runtimes.writing import load_reference, write_served
from featherweight.store.served_folder import Serving
from featherweight.system import toolchains
from featherweight.system.machine import Machine
from tests.support import tokenizers as small
from tests.support.families import family_checkpoint, write_pairs
from tests.support.in_process import InProcess

ENGINE = RUNTIMES["llama.cpp"]
served = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


def spec(**keys: Any) -> Any:
    return ExportSpec.of(engine="llama.cpp", **keys)


# Packing


@pytest.mark.parametrize(("grid", "kind"), [("int8-g32", "Q8_0"), ("int4-g32", "Q4_0")])
def test_blocks_are_read_by_llama_cpps_library_as_the_grid_says(grid: str, kind: str) -> None:
    from gguf.quants import dequantize

    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    q, scales = GRIDS[grid].quantize(weight)
    assert q.min() == GRIDS[grid].qmin, "the value that one end alone has is there"
    stored, found = pack("weight", GRIDS[grid], q, scales)
    assert found.name == kind
    assert torch.equal(torch.from_numpy(dequantize(stored, found)), GRIDS[grid].dequantize(q, scales))


def test_scales_that_float16_does_not_hold_are_not_rounded() -> None:
    q, scales = GRIDS["int8-g32"].quantize(torch.randn(4, 64))
    for other in (scales * (1 + 2**-13), scales * 1e9):
        with pytest.raises(StageError, match="the scales of weight are no float16 numbers, which Q8_0 holds"):
            pack("weight", GRIDS["int8-g32"], q, other)
    with pytest.raises(StageError, match="no blocks for weight, 48 columns on int8-g32"):
        pack("weight", GRIDS["int8-g32"], *GRIDS["int8-g32"].quantize(torch.randn(4, 48)))


@served
@pytest.mark.engine
@pytest.mark.parametrize(
    ("precision", "columns", "kind", "error"),
    [
        ("q4_k", 256, "Q4_K", 0.1),
        ("q6_k", 256, "Q6_K", 0.03),
        ("q5_k", 96, "Q5_1", 0.05),
        ("iq4_nl", 96, "IQ4_NL", 0.1),
    ],
)
def test_llama_cpps_own_quantizer_rounds_rows(precision: str, columns: int, kind: str, error: float) -> None:
    from gguf.quants import dequantize

    weight = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    stored, found = own_kinds.rounded_rows(weight, own_kinds.OWN[precision])
    assert found.name == kind
    difference = torch.from_numpy(dequantize(stored, found)) - weight
    assert 0 < (difference.norm() / weight.norm()).item() < error


@served
@pytest.mark.engine
@pytest.mark.parametrize("precision", ["q4_k", "q5_k", "iq4_nl"])
def test_llama_cpps_own_quantizer_weighs_errors_by_importance(precision: str) -> None:
    from gguf.quants import dequantize

    draws = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(8, 256, generator=draws), torch.rand(256, generator=draws).pow(6)
    made = [own_kinds.rounded_rows(weight, own_kinds.OWN[precision], one) for one in (None, importance)]
    errors = [((torch.from_numpy(dequantize(*one)) - weight).square() * importance).sum() for one in made]
    assert errors[1] < 0.8 * errors[0]


def test_an_imatrix_weighs_the_own_kinds_alone() -> None:
    with pytest.raises(ValueError, match="imatrix plays no role with precision int4; leave it out"):
        spec(precision="int4", imatrix=True)
    assert spec(precision="q4_k", imatrix=True).imatrix
    assert "imatrix" not in spec(precision="q4_k").model_dump()


@pytest.mark.slow
def test_a_special_token_of_minus_one_is_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Of padding, as many a Llama's config.json says; the `gguf` library stopped at it."""
    copytree(tiny_checkpoint, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"pad_token_id": -1}))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    Vocabulary(tmp_path / "m", config["vocab_size"]).write(writer, "default")
    assert not any("padding" in name for name in writer.kv_data[0])
    assert any("eos_token_id" in name for name in writer.kv_data[0])


@pytest.mark.parametrize(("body", "head"), [("int8-g32", "int8-g32"), ("int4-g32", None)])
def test_a_written_file_is_read_back_as_the_same_integers(
    body: str, head: str | None, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = load_reference(tiny_checkpoint)
    quantized = round_to_nearest(model, GRIDS[body], GRIDS[head] if head else None)
    move_to_grid(model, quantized)
    write_file(tmp_path / "m.gguf", model, packed(model, quantized), Vocabulary(tiny_checkpoint, model.config.vocab_size), "int8")
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "m.gguf", tmp_path, tmp_path / "out", Progress())
    found = QuantizedWeights.read(tmp_path / "out")
    assert found is not None and found.grids == quantized.grids
    for name in quantized.q:
        assert torch.equal(found.q[name], quantized.q[name]) and torch.equal(found.scales[name], quantized.scales[name]), name
    kept = load_reference(tmp_path / "out").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


# Refusals


@pytest.mark.parametrize(
    ("keys", "grids", "told"),
    [
        ({"precision": "int8"}, Grids(GRIDS["int8"]), "hold int8-g32 and int4-g32, not int8"),
        ({"precision": "int4"}, Grids(GRIDS["int8-g32"]), "on a 8-bit grid, and precision int4 would round them again"),
        ({"precision": "float16"}, Grids(GRIDS["int8-g32"]), "float16 would store rounded weights at full size"),
        ({"precision": "q4_k"}, Grids(GRIDS["int4-g32"]), "would round weights on int4-g32 again; take int8 or int4"),
        ({"precision": "q4_k"}, Grids(), None),
        ({"precision": "int4"}, Grids(GRIDS["int4-g32"], GRIDS["int8-g32"], GRIDS["int8-g32"]), None),
    ],
)
def test_grids_that_are_no_blocks_are_refused(keys: dict[str, str], grids: Grids, told: str | None) -> None:
    reason = ENGINE.grid_refusal(grids, spec(**keys))
    assert reason is None if told is None else told in str(reason)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("gptj", {}, "no GGUF file is written here for gptj models"),
        ("llama", {"hidden_act": "relu"}, "computes silu in llama models, not relu"),
        ("llama", {"intermediate_size": 48}, "whole blocks of 32 weights, and intermediate_size is 48"),
        ("mistral", {"sliding_window": 16}, "sliding window of 16 tokens, and 64 are to be served; say max_tokens 16"),
        ("qwen3", {"attention_bias": True}, "qwen3 computes with attention_bias False alone"),
        ("qwen2", {"head_dim": 16}, "qwen2 wants heads that are 32 wide together, these are 64"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
            "rotary embeddings of kind dynamic are not written",
        ),
    ],
)
def test_models_that_it_would_compute_otherwise_are_refused(kind: str, changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    checkpoint = family_checkpoint(kind, tmp_path / "checkpoint", **({} if kind == "gptj" else {"intermediate_size": 64}) | changes)
    with pytest.raises(RecipeError) as refused:
        write_served(spec(precision="int8", max_tokens=64), checkpoint=checkpoint, calibration=tmp_path, out=tmp_path)
    assert told in str(refused.value)


# The engine


@served
@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes", "precision"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}, "int8"),
        (
            "llama",
            {
                "rope_parameters": {
                    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0},
                    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
                }
            },
            "float32",
        ),
        ("mistral", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, "float32"),
        ("qwen2", {}, "int4"),
        ("llama", {}, "q4_k"),
        ("qwen3", {"head_dim": 16}, "int8"),
        ("gemma", {"head_dim": 16}, "float32"),
    ],
)
def test_every_family_computes_what_pytorch_computes(
    kind: str, changes: dict[str, Any], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "open_worker", InProcess)
    changes = {"intermediate_size": 64, "max_position_embeddings": 128} | changes
    checkpoint = family_checkpoint(kind, tmp_path / "checkpoint", **changes)
    text = write_pairs(tmp_path / "text")
    out = tmp_path / "out"
    out.mkdir()
    metrics = write_served(spec(precision=precision, max_tokens=96), checkpoint=checkpoint, calibration=text, out=out)
    assert metrics["parity_mean_abs"] < metrics["parity_bound"]
    assert ("parity_weights_max_abs" in metrics) == (precision in ("int8", "int4", "q4_k"))
    assert "AVX" in Serving.read(out).options["built_with"] or "NEON" in Serving.read(out).options["built_with"]


@served
@pytest.mark.engine
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_keys_and_values_in_8_bits_are_judged_by_the_gate_and_the_weights_beside_them_to_the_last_bit(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "open_worker", InProcess)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": None}
    checkpoint = family_checkpoint("llama", tmp_path / "checkpoint", intermediate_size=64, **sizes)
    text, served_by = write_pairs(tmp_path / "text"), {}
    for cache in (None, "q8_0"):
        out = tmp_path / str(cache)
        out.mkdir()
        asked = spec(precision=precision, max_tokens=96, kv_cache=cache)
        metrics = write_served(asked, checkpoint=checkpoint, calibration=text, out=out)
        served_by[cache] = out
    assert Serving.read(out).options["kv_cache"] == "q8_0" and ENGINE.bound(Serving.read(out)) != EXACT
    assert metrics["parity_weights_max_abs"] < EXACT.value and metrics["parity_mean_abs"] < metrics["parity_bound"]
    window = [[1, *range(30, 80)]]
    with InProcess(served_by[None]) as plain, InProcess(served_by["q8_0"]) as rounded:
        assert plain.model.logprobs(window) != rounded.model.logprobs(window), "scores are read from the cache that serves"
        assert len(rounded.generate(window, 5)[0]) == 5


@pytest.mark.slow
def test_a_cache_in_8_bits_wants_heads_of_whole_blocks(tmp_path: Path) -> None:
    checkpoint = family_checkpoint("llama", tmp_path / "checkpoint", intermediate_size=64)
    tmp_path.joinpath("out").mkdir()
    with pytest.raises(RecipeError, match="q8_0 holds whole blocks of 32, and these heads are 8 wide; leave it out"):
        write_served(spec(kv_cache="q8_0"), checkpoint=checkpoint, calibration=tmp_path, out=tmp_path / "out")


@pytest.mark.parametrize(("made", "kind"), [(small.byte_level, "gpt2"), (small.sentencepiece, "llama")])
def test_whether_a_tokenizer_spells_in_bytes_is_told_by_how_it_cuts_and_not_by_its_fallback(
    made: Callable[[], Any], kind: str, tmp_path: Path
) -> None:
    """transformers says byte_fallback of every tokenizer that it reads out of a GGUF file, GPT-2's kind too."""
    made().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"model": told["model"] | {"byte_fallback": True}}))
    assert Vocabulary(tmp_path, 512).kind == kind


@served
@pytest.mark.engine
@pytest.mark.slow
def test_more_texts_than_places_are_written_as_if_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_reference(tiny_checkpoint)
    write_file(tmp_path / "m.gguf", model, {}, Vocabulary(tiny_checkpoint, model.config.vocab_size), "float32")
    serving = Serving("llama.cpp", options={"dtype": "float32"})
    loaded = ENGINE.loaded_model()(tmp_path, serving, Limits(threads=1, max_tokens=64, max_batch=2))
    prompts = [[1, 30, 31, 32 + more][: 2 + more] for more in range(3)] + [[1, *range(40, 80)]]
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    done = loaded.generate(prompts, 12)
    assert done.tokens == expected and 0 < done.timing.ttft_s <= done.timing.total_s
    end = expected[0][4]
    settings = {"eos_token_id": [end, expected[3][7]]}
    ended = loaded.answer(prompts, 12, settings)
    assert ended == [GenerationSettings(settings).cut(row, 12) for row in expected] and len(ended[0]) <= 5
    penalized = loaded.answer(prompts[:1], 12, {"repetition_penalty": 1.8})
    ids = torch.tensor([prompts[0]])
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, repetition_penalty=1.8)
    assert penalized == [theirs[0, ids.shape[1] :].tolist()]
    loaded.unload()


@pytest.mark.parametrize(("told", "bound"), [({}, EXACT), ({"gelu": "table"}, TABLE)])
def test_a_table_of_gelu_is_allowed_what_it_explains_and_no_more(told: dict[str, str], bound: Bound) -> None:
    assert ENGINE.bound(Serving("llama.cpp", options={"dtype": "float32", **told})) == bound


def test_a_library_that_was_compiled_for_this_cpu_comes_before_the_wheels(tmp_path, monkeypatch) -> None:
    made = tmp_path / library.NATIVE / "lib" / "python3.11" / "site-packages" / library.NATIVE_FILE
    for needed in (toolchains.interpreter(tmp_path / library.NATIVE), made):
        needed.parent.mkdir(parents=True)
        needed.touch()
    monkeypatch.setenv(toolchains.LOCATION, str(tmp_path / "none"))
    assert library.file() != made
    monkeypatch.setenv(toolchains.LOCATION, str(tmp_path))
    assert library.file() == made and ENGINE.missing() is None
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    assert ENGINE.missing() is None
    monkeypatch.setenv(toolchains.LOCATION, str(tmp_path / "none"))
    assert "run 'pip install xllamacpp==" in str(ENGINE.missing())


def test_a_cpu_that_can_more_than_the_library_is_told_how_to_gain_by_it(monkeypatch) -> None:
    plain = Machine("Linux", "x86_64", "Some CPU", frozenset({"avx2", "fma"}), 2, 2, 24 * 2**30, ())
    more = replace(plain, cpu_features=plain.cpu_features | {"avx512_vnni"})
    assert ENGINE.machine_note(plain) is None
    reason, way_out = ENGINE.machine_note(more) or ("", "")
    assert "AVX2" in reason and "avx512_vnni" in reason and "featherweight doctor --install llama.cpp-native" in way_out
    monkeypatch.setattr("featherweight.runtimes.llama_cpp.runtime.describe", lambda: more)
    monkeypatch.setattr(library, "file", lambda: Path("libllama.so"))
    monkeypatch.setattr(library, "built_with", lambda: "AVX2, AVX512, AVX512_VNNI")
    assert ENGINE.machine_note(more) is None
