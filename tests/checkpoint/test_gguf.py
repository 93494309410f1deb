"""GGUF: split files, whether texts begin with BOS, and integers that are a grid of ours."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from featherweight.checkpoint.description import described
from featherweight.checkpoint.facts import kept_refusal, read_facts
from featherweight.checkpoint.fetching import source_fingerprint
from featherweight.checkpoint.files import WEIGHTS, Listing
from featherweight.checkpoint.gguf_faults import readable, require_model
from featherweight.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf
from featherweight.checkpoint.gguf_parts import _require_one_model, join, names_of_parts, only_model
from featherweight.checkpoint.spec import LoadSpec
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import CheckpointError
from featherweight.grid import GRIDS
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Progress
from featherweight.runtimes.generation_settings import GenerationSettings
from tasks.load import load
from tests.support.gguf_files import rewritten, write_gguf
from tests.support.notes import Notes


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def taken(source: Path, out: Path, progress: Progress = Progress()) -> dict[str, float]:
    return dict(load(LoadSpec(source=str(source)), out=out, progress=progress))


def test_the_names_of_parts() -> None:
    parts = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    assert names_of_parts(parts[1]) == parts
    assert only_model([*parts, "README.md"]) == parts
    assert only_model(["a.gguf"]) == ("a.gguf",)
    assert only_model(["a.gguf", "b.gguf"]) is only_model([]) is None


@pytest.mark.slow
@pytest.mark.parametrize("named", ["folder", "first", "last"])
def test_a_model_in_several_files_is_one(named: str, tiny_checkpoint: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "split").mkdir()
    files = write_gguf(tmp_path / "split" / "m.gguf", tiny_checkpoint, parts=3)
    metrics = taken({"folder": files[0].parent, "first": files[0], "last": files[-1]}[named], out)
    assert metrics["layers"] == 2
    found, right = load_file(out / WEIGHTS), load_file(tiny_checkpoint / WEIGHTS)
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())
    before = source_fingerprint(LoadSpec(source=str(files[0])))
    files[-1].write_bytes(files[-1].read_bytes() + b" ")
    assert source_fingerprint(LoadSpec(source=str(files[0]))) != before


@pytest.mark.parametrize("alignment", [8, 64])
def test_parts_may_align_their_tensors_otherwise(alignment: int, tiny_checkpoint: Path, tmp_path: Path, out: Path) -> None:
    """Of 8 the joined file's tensors were read from 24 bytes before their places, without a word; of 64 it was refused."""
    files = write_gguf(tmp_path / "m.gguf", tiny_checkpoint, parts=3, alignment=alignment)
    taken(files[0], out)
    found, right = load_file(out / WEIGHTS), load_file(tiny_checkpoint / WEIGHTS)
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())


def test_a_missing_part_is_named(tiny_checkpoint: Path, tmp_path: Path, out: Path) -> None:
    files = write_gguf(tmp_path / "m.gguf", tiny_checkpoint, parts=3)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=r"one of 3 parts, and m-00002-of-00003\.gguf is missing"):
        taken(files[0], out)
    assert list(out.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("add_bos", [True, False])
def test_texts_begin_as_the_file_says(add_bos: bool, tiny_checkpoint: Path, tmp_path: Path, out: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_checkpoint, add_bos=add_bos)
    taken(tmp_path / "m.gguf", out)
    tokenizer = load_tokenizer(out)
    plain = tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    assert tokenizer("Once upon a time")["input_ids"] == ([tokenizer.bos_token_id] if add_bos else []) + plain


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "grid"), [("Q8_0", "int8-g32"), ("Q4_0", "int4-g32")])
def test_integers_on_a_grid_of_ours_are_kept(kind: str, grid: str, tiny_checkpoint: Path, tmp_path: Path, out: Path) -> None:
    import gguf

    file = tmp_path / "m.gguf"
    write_gguf(file, tiny_checkpoint, kinds={"": kind})
    metrics = taken(file, out)
    kept, weights = QuantizedWeights.read(out), load_file(out / WEIGHTS)
    assert kept
    assert (kept.grid, kept.head) == (grid, grid)
    assert metrics["quantized_layers"] == len(kept.q) == 15
    assert metrics["dequantized_layers"] == 0
    for name in kept.q:
        assert torch.equal(kept.dequantize(name), weights[name]), name
    source = load_file(tiny_checkpoint / WEIGHTS)["model.layers.0.mlp.up_proj.weight"].numpy()
    packed = gguf.quants.quantize(source, getattr(gguf.GGMLQuantizationType, kind))
    theirs = gguf.quants.dequantize(packed, getattr(gguf.GGMLQuantizationType, kind))
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], torch.from_numpy(theirs))


@pytest.mark.slow
def test_other_types_become_float_and_are_said(tiny_checkpoint: Path, tmp_path: Path, out: Path) -> None:
    """Q5_0 stands for all that is no grid here, K-quants among them."""
    told = Notes()
    write_gguf(tmp_path / "m.gguf", tiny_checkpoint, kinds={"down_proj": "Q5_0", "": "Q8_0"})
    metrics = taken(tmp_path / "m.gguf", out, told)
    kept = QuantizedWeights.read(out)
    assert kept
    assert (metrics["quantized_layers"], metrics["dequantized_layers"]) == (13, 2)
    assert not any("down_proj" in name for name in kept.q)
    assert any("become float: Q5_0 (2)" in note for note in told.notes)


@pytest.mark.slow
def test_every_type_of_llama_cpp_is_read_as_its_library_reads_it(tiny_checkpoint: Path, tmp_path: Path, out: Path) -> None:
    """K-quants, IQ and the rest: each in a matrix of its own of a Llama whose rows are whole blocks."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config = LlamaConfig.from_pretrained(tiny_checkpoint, **sizes, head_dim=64)
    load_tokenizer(tiny_checkpoint).save_pretrained(tmp_path / "wide")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    types = sorted(kind.name for kind in gguf.quants._type_traits if kind.name != "BF16")
    matrices = [f"layers.{n}.{part}" for n in range(5) for part in ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")]
    kinds = {f"{matrix.rpartition('.')[0]}.{where(matrix)}": kind for matrix, kind in zip(matrices, types, strict=False)}
    files = write_gguf(tmp_path / "m.gguf", tmp_path / "wide", kinds=kinds)
    taken(files[0], out)
    weights = load_file(out / WEIGHTS)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(files[0]).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 5)
    assert len(types) > 20
    for place, kind in kinds.items():
        tensor = stored[str(names.get_name(f"model.{place}.weight", try_suffixes=(".weight",)))]
        assert tensor.tensor_type.name == kind
        right = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(weights[f"model.{place}.weight"], torch.from_numpy(right.copy())), kind


def where(matrix: str) -> str:
    """'layers.0.v_proj' -> 'self_attn.v_proj'."""
    part = matrix.rpartition(".")[2]
    return f"self_attn.{part}" if part in ("v_proj", "o_proj") else f"mlp.{part}"


def text(value: str) -> bytes:
    """A setting as a file holds it."""
    return struct.pack("<IQ", 8, len(value)) + value.encode()


def listed(*values: str) -> bytes:
    """One that is a list of texts."""
    return struct.pack("<IIQ", 9, 8, len(values)) + b"".join(text(value)[4:] for value in values)


BYTES = {
    "tokenizer.ggml.model": text("gpt2"),
    "tokenizer.ggml.tokens": listed("a", "b", "ab"),
    "tokenizer.ggml.merges": listed("a b"),
}


def test_blocks_that_are_not_counted_and_tokenizers_of_other_kinds_are_refused() -> None:
    said = {"general.architecture": text("llama")} | BYTES
    tensors = {f"blk.{n}.ffn_up.weight": GgufTensor(0, (4,), 0, 16) for n in range(3)}
    require_model(GgufHeader(said | {"llama.block_count": struct.pack("<II", 4, 3)}, tensors), "m.gguf")
    with pytest.raises(CheckpointError, match=r"m\.gguf has the block 2, and llama\.block_count is 2; convert the model again"):
        require_model(GgufHeader(said | {"llama.block_count": struct.pack("<II", 4, 2)}, tensors), "m.gguf")
    with pytest.raises(CheckpointError, match=r"a tokenizer of the kind 'rwkv', and known are llama, gpt2;"):
        require_model(GgufHeader(said | {"tokenizer.ggml.model": text("rwkv")}, tensors), "m.gguf")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"tokenizer.ggml.merges": text("a b")}, "has no tokenizer.ggml.merges, which its tokenizer is built of"),
        ({"tokenizer.ggml.tokens": listed()}, "has no tokenizer.ggml.tokens, which"),
        ({"tokenizer.ggml.model": text("llama")}, "has no tokenizer.ggml.scores, which"),
        ({"tokenizer.ggml.token_type": struct.pack("<IIQ2i", 9, 5, 2, 1, 1)}, "has 3 tokens and 2 in tokenizer.ggml.token_type"),
    ],
)
def test_a_tokenizer_that_lacks_a_part_is_told_by_the_header(wrong: dict[str, bytes], reason: str) -> None:
    """It was told at load, after a plan that promised to serve it."""
    tensors = {"output_norm.weight": GgufTensor(0, (4,), 0, 16)}
    require_model(GgufHeader(BYTES, tensors), "m.gguf")
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        require_model(GgufHeader(BYTES | wrong, tensors), "m.gguf")


def test_an_architecture_that_transformers_names_and_cannot_read_is_refused() -> None:
    """It ended in "only 0-dimensional arrays can be converted to Python scalars"."""
    said = {"general.architecture": text("gpt-oss"), "tokenizer.ggml.model": text("gpt2")}
    with pytest.raises(CheckpointError, match=r"m\.gguf is a gpt-oss, whose experts and scaled rotary embeddings transf"):
        require_model(GgufHeader(said, {"output_norm.weight": GgufTensor(0, (4,), 0, 16)}), "m.gguf")


def test_an_lfm2_tells_which_layers_convolve_and_gates_of_shared_experts_are_vectors() -> None:
    """transformers ended in "'int' object is not iterable", and in a shape that does not fit."""
    said = {"general.architecture": text("lfm2")} | BYTES
    said |= {"lfm2.block_count": struct.pack("<II", 4, 2)}
    tensors = {"blk.0.ffn_up.weight": GgufTensor(0, (4,), 0, 16)}
    heads = {"lfm2.attention.head_count_kv": struct.pack("<IIQII", 9, 4, 2, 0, 8)}
    require_model(GgufHeader(said | heads, tensors), "m.gguf")
    for wrong in ({}, {"lfm2.attention.head_count_kv": struct.pack("<II", 4, 8)}):
        with pytest.raises(CheckpointError, match=r"m\.gguf does not tell which layers convolve and which attend \(lfm2"):
            require_model(GgufHeader(said | wrong, tensors), "m.gguf")
    gate = {"blk.0.ffn_gate_inp_shexp.weight": GgufTensor(0, (64, 1), 0, 256)}
    with pytest.raises(CheckpointError, match=r"m\.gguf: blk\.0\.ffn_gate_inp_shexp\.weight is a matrix, where llama\.cpp's conv"):
        require_model(GgufHeader(said | heads, tensors | gate), "m.gguf")


def test_types_that_nothing_makes_floats_of_are_refused_by_their_tensor() -> None:
    from gguf import GGMLQuantizationType as Type

    assert [readable(kind) for kind in (Type.F32, Type.IQ1_M, Type.MXFP4, Type.Q8_1, Type.I16)] == [True, True, True, False, False]
    tensors = {"a.weight": GgufTensor(Type.F16, (4,), 0, 8), "b.weight": GgufTensor(Type.Q8_K, (256,), 8, 300)}
    header = GgufHeader(BYTES, tensors)
    with pytest.raises(CheckpointError, match=r"m\.gguf: b\.weight is of the type Q8_K, which gguf makes no floats of"):
        require_model(header, "m.gguf")


def test_a_type_of_a_fork_of_llama_cpp_is_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (file,) = write_gguf(tmp_path / "m.gguf", tiny_checkpoint)
    named = b"output_norm.weight" + struct.pack("<IQ", 1, 64)
    content = file.read_bytes()
    assert named in content
    file.write_bytes(content.replace(named + struct.pack("<I", 0), named + struct.pack("<I", 139)))
    with pytest.raises(CheckpointError, match=r"a tensor of type 139, which a fork of llama\.cpp writes; quantize the model again"):
        read_facts(LoadSpec(source=str(file)))


def test_a_float_file_is_not_quantized(tiny_checkpoint: Path, tmp_path: Path, out: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_checkpoint, kinds={"": "F16"})
    assert "quantized_layers" not in taken(tmp_path / "m.gguf", out)
    assert QuantizedWeights.read(out) is None


def test_an_embedding_alone_on_a_grid_leaves_a_checkpoint_to_be_quantized(tiny_checkpoint: Path, tmp_path: Path, out: Path) -> None:
    """SmolLM2's Q4_1 file has its embedding in Q8_0, and every quantize stage was refused."""
    told = Notes()
    write_gguf(tmp_path / "m.gguf", tiny_checkpoint, kinds={"embed_tokens": "Q8_0", "": "Q4_1"})
    facts = read_facts(LoadSpec(source=str(tmp_path / "m.gguf")))
    assert (facts.quantized, facts.kept_grids, kept_refusal(facts)) == ("gguf", None, None)
    metrics = taken(tmp_path / "m.gguf", out, told)
    assert (metrics["quantized_layers"], metrics["dequantized_layers"]) == (0, 15)
    assert QuantizedWeights.read(out) is None
    assert any("become float: Q4_1 (14), Q8_0 (1)" in note for note in told.notes)


def test_a_plan_knows_which_integers_a_file_keeps(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_checkpoint, kinds={"embed_tokens": "Q8_0", "": "Q4_0"})
    facts = read_facts(LoadSpec(source=str(tmp_path / "m.gguf")))
    assert facts.kept_grids == (GRIDS["int4-g32"], GRIDS["int8-g32"], None)
    assert "leave the quantize stage out" in str(kept_refusal(facts))
    assert (facts.model_type, facts.config.num_hidden_layers) == ("llama", 2)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_plan_knows_a_configuration_as_transformers_does(parts: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """It is given the file without the lists of its tokenizer, which transformers would go through for the vocabulary's size."""
    files = write_gguf(tmp_path / "m.gguf", tiny_checkpoint, parts=parts)
    whole = files[0] if parts == 1 else join(files, tmp_path / "whole.gguf")
    expected, place = described(whole.parent, whole.name)["config"]["values"], ("name_or_path", "_name_or_path")
    found = read_facts(LoadSpec(source=str(files[0]))).config.to_dict()
    assert found | dict.fromkeys(place) == expected | dict.fromkeys(place)
    assert len(read_gguf(Listing.of(tmp_path), files[0].name).sketch()) < 20_000


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("llama.rope.scaling.type", "yarn", r"scales its rotary embeddings \(llama\.rope\.scaling\.type is yarn\)"),
        ("llama.rope.scaling.type", "longrope", r"scales its rotary embeddings \(llama\.rope\.scaling\.type is longrope\)"),
        ("general.type", "mmproj", r"no model but a part beside one \(general\.type is mmproj\); name the model's file"),
        ("llama.rope.scaling.type", "none", None),
        ("general.type", "model", None),
    ],
)
def test_what_transformers_takes_no_notice_of_is_told_in_the_plan(
    key: str, value: str, reason: str | None, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """It would be served as another model than its author made."""
    (file,) = write_gguf(tmp_path / "m.gguf", tiny_checkpoint, says={key: value})
    if reason is None:
        assert read_facts(LoadSpec(source=str(file))).model_type == "llama"
        return
    with pytest.raises(CheckpointError, match=reason):
        read_facts(LoadSpec(source=str(file)))


def test_a_vocabulary_whose_size_is_not_told_is_the_tokenizers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (file,) = write_gguf(tmp_path / "m.gguf", tiny_checkpoint)
    size = read_facts(LoadSpec(source=str(file))).config.vocab_size
    file.write_bytes(file.read_bytes().replace(b"llama.vocab_size", b"llamb.vocab_sizf"))
    assert read_facts(LoadSpec(source=str(file))).config.vocab_size == size


SCALED = "llama.rope.scaling."
FIRST, HEAD_WIDTH = "original_max_position_embeddings", 16
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, FIRST: 64}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({f"{SCALED}type": "linear", f"{SCALED}factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "linear, of no kind": ({f"{SCALED}factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "linear, of 2023": ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        {f"{SCALED}type": "yarn", f"{SCALED}factor": 4.0, f"{SCALED}original_context_length": 64},
        {"rope_type": "yarn", "factor": 4.0, FIRST: 64},
    ),
    "llama3": ({}, LLAMA3),
}
"""What a file says, and what it is in transformers' words."""


def llama3_factors(model: PreTrainedModel) -> list[float]:
    """Of each frequency, as llama.cpp's converter writes them: by what transformers divides it."""
    plain = [10_000.0 ** (-at / HEAD_WIDTH) for at in range(0, HEAD_WIDTH, 2)]
    rotary: Any = model.get_decoder().rotary_emb
    return [one / scaled for one, scaled in zip(plain, rotary.inv_freq.tolist(), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("parts", [1, 3])
def test_scaled_rotary_embeddings_are_those_of_the_file(
    kind: str, parts: int, tiny_checkpoint: Path, tmp_path: Path, out: Path
) -> None:
    says, wanted = SCALINGS[kind]
    config = AutoConfig.from_pretrained(tiny_checkpoint)
    config.rope_parameters |= wanted
    right = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, config=config, dtype=torch.float32).eval()
    factors = llama3_factors(right) if kind == "llama3" else None
    files = write_gguf(tmp_path / "m.gguf", tiny_checkpoint, parts=parts, says=says, factors=factors)
    planned = read_facts(LoadSpec(source=str(files[0]))).config.rope_parameters
    told = Notes()
    taken(files[0], out, told)
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert {key: planned[key] for key in wanted} == {key: found.config.rope_parameters[key] for key in wanted} == wanted
    assert any(f"rotary embeddings are scaled ({wanted['rope_type']}, " in note for note in told.notes)
    ids = torch.arange(3, 3 + 120).remainder(config.vocab_size)[None]
    with torch.no_grad():
        assert (right(ids).logits - found(ids).logits).abs().max() < 1e-5
        assert (AutoModelForCausalLM.from_pretrained(tiny_checkpoint)(ids).logits - found(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("says", "factors"),
    [
        ({}, [1.0, 1.5, 9.0, *(8.0 for _ in range(5))]),
        ({f"{SCALED}type": "linear", f"{SCALED}factor": 4.0}, [1.0, *(8.0 for _ in range(7))]),
        ({f"{SCALED}type": "yarn", f"{SCALED}factor": 4.0}, None),
        ({f"{SCALED}type": "linear", f"{SCALED}factor": 4.0, f"{SCALED}attn_factor": 1.2}, None),
        ({f"{SCALED}attn_factor": 1.2}, None),
    ],
)
def test_a_scaling_that_is_not_known_is_refused(
    says: dict[str, Any], factors: list[float] | None, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (file,) = write_gguf(tmp_path / "m.gguf", tiny_checkpoint, says=says, factors=factors)
    with pytest.raises(CheckpointError, match="scales its rotary embeddings"):
        read_facts(LoadSpec(source=str(file)))


def test_what_a_files_tokenizer_does_is_known_in_the_plan(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Its lead, and that its chat template writes no conversation, which the first request told."""
    said = {"tokenizer.chat_template": "{{ raise_exception('no') }}"}
    for parts, add_bos, lead in ((1, True, (0,)), (2, False, ())):
        file, *_ = write_gguf(tmp_path / f"{parts}.gguf", tiny_checkpoint, parts=parts, add_bos=add_bos, says=said)
        opened = read_facts(LoadSpec(source=str(file))).opened
        assert opened and (opened.lead, opened.chat) == (lead, "no")


def test_pieces_beyond_a_files_embedding_are_told_in_the_plan(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    shutil.copytree(tiny_checkpoint, tmp_path / "cut")
    model = LlamaForCausalLM.from_pretrained(tiny_checkpoint)
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "cut")
    (file,) = write_gguf(tmp_path / "m.gguf", tmp_path / "cut")
    with pytest.raises(CheckpointError, match=r"m.gguf: the tokenizer has ids up to 319, but the embedding has only 300 rows"):
        read_facts(LoadSpec(source=str(file)))


def test_a_padding_token_beyond_a_files_vocabulary_is_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (file,) = write_gguf(tmp_path / "m.gguf", tiny_checkpoint, says={"tokenizer.ggml.padding_token_id": 999})
    with pytest.raises(CheckpointError, match=r"m.gguf describes no model .*: its padding token lies beyond its vocabulary"):
        read_facts(LoadSpec(source=str(file)))


def test_texts_end_at_the_end_of_a_turn_too(tiny_checkpoint: Path, tmp_path: Path, out: Path) -> None:
    """As llama.cpp ends them, and the checkpoint's own generation_config.json did; transformers reads one end of a file."""
    said = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 8}
    (file,) = write_gguf(tmp_path / "m.gguf", tiny_checkpoint, says=said)
    assert read_facts(LoadSpec(source=str(file))).generation.eos_token_id == [1, 7, 8]
    load(LoadSpec(source=str(file)), out=out)
    assert GenerationSettings.read(out).ends == [1, 7, 8]


def swapped(files: list[Path]) -> None:
    aside = files[0].with_name("aside")
    files[1].rename(aside)
    files[2].rename(files[1])
    aside.rename(files[2])


def of_a_longer_split(files: list[Path]) -> None:
    """The first of three parts under a name without a number."""
    files[0].rename(files[0].with_name("tiny.gguf"))
    for file in files[1:]:
        file.unlink()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (swapped, "says that it is part 3 of 3, and is taken as 2 of 3; give each part the name that it had"),
        (of_a_longer_split, "says that it is part 1 of 3, and is taken as 1 of 1"),
    ],
)
def test_parts_are_those_of_one_model_in_their_places(wrong: Any, reason: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """By their names alone, others were taken for them."""
    place = tmp_path / "place"
    place.mkdir()
    wrong(write_gguf(place / "tiny.gguf", tiny_checkpoint, parts=3))
    with pytest.raises(CheckpointError, match=reason) as error:
        read_facts(LoadSpec(source=str(place)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "name", "reason"),
    [
        ({}, "a", "tiny-2.gguf and tiny-1.gguf both hold a: parts of two models"),
        ({"general.name": b"other"}, "b", "says another general.name than tiny-1.gguf: parts of two models"),
        ({"split.tensors.count": struct.pack("<Ii", 5, 3)}, "b", "counts 3 tensors in all parts, and there are 2"),
    ],
)
def test_parts_that_say_otherwise_than_the_first_are_of_another_model(settings: Any, name: str, reason: str) -> None:
    tensor = GgufTensor(0, (1,), 0, 4)
    first = {"general.name": b"one"} | {key: value for key, value in settings.items() if key.startswith("split")}
    headers = [GgufHeader(first, {"a": tensor}), GgufHeader(settings, {name: tensor})]
    with pytest.raises(CheckpointError, match=reason):
        _require_one_model([Path("tiny-1.gguf"), Path("tiny-2.gguf")], headers)


def other_norm(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.input_layernorm.weight"] = torch.ones(63)


def turned(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].T.contiguous()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_norm, r"blk\.1\.attn_norm\.weight has shape \[63\], and the file's settings ask for \[64\]"),
        (turned, r"blk\.1\.ffn_up\.weight has shape \[64, 128\], and the file's settings ask for \[128, 64\]"),
    ],
)
def test_shapes_that_the_settings_do_not_ask_for_are_told_in_the_plan(
    change: Any, reason: str, tiny_checkpoint: Path, tmp_path: Path, out: Path
) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    tensors = load_file(source / WEIGHTS)
    change(tensors)
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    (file,) = write_gguf(tmp_path / "tiny.gguf", source)
    for ask in (lambda: read_facts(LoadSpec(source=str(file))), lambda: taken(file, out)):
        with pytest.raises(CheckpointError, match=reason):
            ask()


@pytest.mark.parametrize(
    ("says", "left_out", "reason"),
    [
        ({"llama.vocab_size": 77}, "", r"token_embd\.weight has shape \[\d+, 64\], and the file's settings ask for \[77, 64\]"),
        ({"llama.attention.head_count": 8}, "", r"has shape \[\d+, 64\], and the file's settings ask for"),
        (
            {"llama.attention.head_count": "4"},
            "",
            r"llama\.attention\.head_count is no number, which no llama of",
        ),
        ({}, "llama.attention.layer_norm_rms_epsilon", r"it does not say llama\.attention\.layer_norm_rms_epsilon; convert"),
        ({}, "llama.context_length", r"it does not say llama\.context_length; convert the model again"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "", r"eos_token_id is 9999, and its tokenizer has \d+ tokens"),
    ],
)
def test_settings_that_a_file_lacks_or_that_are_not_its_own_are_told_in_the_plan(
    says: dict[str, Any], left_out: str, reason: str, tiny_checkpoint: Path, tmp_path: Path, out: Path
) -> None:
    """transformers took its own defaults for what was left out."""
    (plain,) = write_gguf(tmp_path / "plain.gguf", tiny_checkpoint)
    file = rewritten(plain, tmp_path / "tiny.gguf", says, left_out)
    for ask in (lambda: read_facts(LoadSpec(source=str(file))), lambda: taken(file, out)):
        with pytest.raises(CheckpointError, match=reason):
            ask()


def test_settings_with_a_number_for_each_layer_are_told_in_our_words(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (plain,) = write_gguf(tmp_path / "plain.gguf", tiny_checkpoint)
    file = rewritten(plain, tmp_path / "tiny.gguf", {"llama.attention.head_count_kv": [2, 2]})
    with pytest.raises(CheckpointError, match=r"head_count_kv is a number for each layer, which no llama of transformers takes"):
        read_facts(LoadSpec(source=str(file)))
