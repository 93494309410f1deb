"""What a checkpoint is, and every way in which one is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featherweight.checkpoint import inspection, tensors
from featherweight.checkpoint.files import INDEX, PICKLE, WEIGHTS, Listing, find_weights, missing_part, needed_files
from featherweight.checkpoint.inspection import inspect_checkpoint
from featherweight.errors import CheckpointError
from tests.support.paths import SHARED

MODELS = SHARED / "models"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def read(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}


def write(folder: Path, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit(path: Path, **values: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard(folder: Path) -> list[Path]:
    """Turn the checkpoint into shards."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    return sorted(folder.glob("model-*.safetensors"))


def refusal(folder: Path, **options: Any) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as error:
        inspect_checkpoint(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_it_says_what_the_checkpoint_is(tiny_checkpoint: Path):
    from transformers import LlamaForCausalLM

    info = inspect_checkpoint(tiny_checkpoint)
    model = LlamaForCausalLM.from_pretrained(tiny_checkpoint)
    assert info == inspection.CheckpointInfo(
        architecture="LlamaForCausalLM",
        model_type="llama",
        parameters=model.num_parameters(),
        size_bytes=(tiny_checkpoint / WEIGHTS).stat().st_size,
        vocab=model.config.vocab_size,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        tied=True,
        context=256,
    )


@pytest.mark.slow
@pytest.mark.skipif(not MODELS.is_dir(), reason="no shared models on this machine")
@pytest.mark.parametrize(("name", "parameters"), [("stories260K", 260_032), ("stories15M", 15_191_712)])
def test_it_accepts_a_real_checkpoint(name: str, parameters: int):
    info = inspect_checkpoint(MODELS / name)
    assert (info.parameters, info.tied) == (parameters, True)


def architectures() -> dict[str, Any]:
    """Other families: renamed attributes, fused experts, biases.

    For a Qwen2 configuration transformers loads its own tokenizer class, which adds a token: hence the larger vocabulary.
    """
    from transformers import GPT2Config, MixtralConfig, Qwen2Config

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "gpt2": GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "mixtral": MixtralConfig(vocab_size=328, num_key_value_heads=2, num_local_experts=2, **sizes),
        "qwen2": Qwen2Config(vocab_size=328, num_key_value_heads=2, tie_word_embeddings=False, **sizes),
    }


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen2"])
def test_it_takes_other_architectures_as_transformers_saves_them(folder: Path, name: str):
    from transformers import AutoModelForCausalLM

    config = architectures()[name]
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    info = inspect_checkpoint(folder)
    assert (info.model_type, info.parameters, info.layers, info.heads) == (name, model.num_parameters(), 2, 4)
    assert info.tied == (name == "gpt2")


def test_names_without_the_models_prefix_are_accepted(folder: Path, tiny_checkpoint: Path):
    write(folder, {name.removeprefix("model."): tensor for name, tensor in read(folder).items()})
    assert inspect_checkpoint(folder).parameters == inspect_checkpoint(tiny_checkpoint).parameters


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_head_that_is_stored_too_is_tied_only_where_it_is_equal(folder: Path, tiny_checkpoint: Path, scale: float):
    tensors = read(folder)
    head = tensors["model.embed_tokens.weight"] * scale
    write(folder, tensors | {"lm_head.weight": head})
    info = inspect_checkpoint(folder)
    assert info.tied == (scale == 1.0)
    extra = 0 if info.tied else head.numel()
    assert info.parameters == inspect_checkpoint(tiny_checkpoint).parameters + extra


def test_shards_are_accepted_and_only_needed_files_are_named(folder: Path):
    shards = shard(folder)
    (folder / "consolidated.safetensors").write_bytes(b"not ours")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "training_args.bin").write_bytes(b"pickle")
    assert inspect_checkpoint(folder).size_bytes == sum(path.stat().st_size for path in shards)
    listing = Listing.of(folder)
    names = needed_files(listing, find_weights(listing))
    assert set(names) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        INDEX,
        *(path.name for path in shards),
    }


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def small_embedding(folder: Path) -> None:
    tensors = read(folder)
    name = "model.embed_tokens.weight"
    write(folder, tensors | {name: tensors[name][:300].contiguous()})
    edit(folder / "config.json", vocab_size=300)


def poison(value: float, dtype: str = "float32") -> Callable[[Path], None]:
    def breaks(folder: Path) -> None:
        import torch

        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in read(folder).items()}
        tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = value
        write(folder, tensors)

    return breaks


def reshape(folder: Path) -> None:
    tensors = read(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    write(folder, tensors | {name: tensors[name].T.contiguous()})


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: write(folder, {key: tensor for key, tensor in read(folder).items() if key != name})


def add(name: str) -> Callable[[Path], None]:
    return lambda folder: write(folder, read(folder) | {name: read(folder)["model.norm.weight"]})


def append(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")


def as_pickle(folder: Path) -> None:
    import torch

    torch.save(read(folder), folder / PICKLE)
    (folder / WEIGHTS).unlink()


def lose_shard(folder: Path) -> None:
    shard(folder)[1].unlink()


def lose_tensor_of_shard(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = shard(folder)[1]
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)


def one_in_two_shards(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    first, second = shard(folder)[:2]
    name, tensor = next(iter(load_file(second).items()))
    save_file(load_file(first) | {name: tensor * 2}, first)


def truncate_shard(folder: Path) -> None:
    path = shard(folder)[1]
    os.truncate(path, path.stat().st_size - 1)


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def configure(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **values)


def replace(name: str, text: str) -> Callable[[Path], int]:
    return lambda folder: (folder / name).write_text(text)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 9\n"

UP = "model.layers.1.mlp.up_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing folder": (shutil.rmtree, ["does not exist", "its path in the recipe"]),
    "no config": (remove("config.json"), ["has no config.json", "these weights were saved with"]),
    "a tokenizer alone": (remove("config.json", "model.safetensors"), ["has no config.json", "a tokenizer alone"]),
    "a pipeline of diffusers": (
        lambda folder: (folder / "config.json").rename(folder / "model_index.json"),
        ["has no config.json", "a pipeline of diffusers"],
    ),
    "sentence-transformers' own layout": (
        lambda folder: (folder / "config.json").rename(folder / "modules.json"),
        ["has no config.json", "0_Transformer, up beside modules.json"],
    ),
    "config is not JSON": (replace("config.json", '{"model_type": "ll'), ["config.json is not JSON", "copy it again"]),
    "config is a list": (replace("config.json", "[]"), ["config.json", "JSON object", "list"]),
    "no model type": (replace("config.json", "{}"), ["config.json", "model_type"]),
    "unknown model type": (configure(model_type="lhama"), ["config.json", "lhama"]),
    "unknown architecture": (configure(architectures=["Lhama"], model_type="clip"), ["config.json", "'Lhama'"]),
    "impossible sizes": (configure(hidden_size=63), ["config.json"]),
    "sizes of the wrong type": (configure(num_hidden_layers="two"), ["config.json"]),
    "no weights": (remove(WEIGHTS), ["holds no weights", WEIGHTS]),
    "empty weights": (replace(WEIGHTS, ""), [WEIGHTS, "0 bytes", "copy it again"]),
    "weights that are a pointer": (replace(WEIGHTS, POINTER), [WEIGHTS, "pointer of Git LFS", "git lfs pull"]),
    "weights that are an error page": (replace(WEIGHTS, "<html>404</html>"), [WEIGHTS, "no safetensors header"]),
    "bytes after the end": (append, [WEIGHTS, "bytes after its end"]),
    "missing shard": (lose_shard, [INDEX, "model-00002-of-", "missing", "shards are there"]),
    "missing tensor in a shard": (lose_tensor_of_shard, ["model-00002-of-", "lacks tensor", "index"]),
    "a tensor in two shards": (one_in_two_shards, ["model-00001-of-", "model-00002-of-", "is in both"]),
    "truncated shard": (truncate_shard, ["model-00002-of-", "truncated"]),
    "index without a map": (lambda folder: (shard(folder), (folder / INDEX).write_text("{}")), [INDEX, "weight_map"]),
    "NaN": (poison(float("nan")), [WEIGHTS, UP, "NaN"]),
    "infinity": (poison(float("inf")), [WEIGHTS, UP, "infinite"]),
    "negative infinity in bfloat16": (poison(float("-inf"), "bfloat16"), [UP, "infinite"]),
    "NaN in float16": (poison(float("nan"), "float16"), [UP, "NaN"]),
    "NaN in float8": (poison(float("nan"), "float8_e4m3fn"), [UP, "NaN"]),
    "missing tokenizer": (no_tokenizer, ["has no tokenizer", "tokenizer.json"]),
    "damaged tokenizer": (replace("tokenizer.json", '{"version": "1.0"'), ["tokenizer does not load"]),
    "vocabulary over the embedding": (small_embedding, ["ids up to 319", "300 rows"]),
    "pickle": (as_pickle, [PICKLE, "checkpoint.allow_pickle: true"]),
    "code of its own": (configure(auto_map={"AutoConfig": "x.Y"}), ["auto_map", "checkpoint.trust_remote_code: true"]),
    "tokenizer with code of its own": (
        lambda folder: edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
        ["tokenizer_config.json", "checkpoint.trust_remote_code: true"],
    ),
    "packed weights": (configure(quantization_config={"quant_method": "gptq"}), ["quantized already", "gptq"]),
    "missing tensor": (drop("model.layers.0.mlp.up_proj.weight"), ["model.layers.0.mlp.up_proj.weight", "is missing"]),
    "no embedding at all": (drop("model.embed_tokens.weight"), ["embed_tokens.weight", "missing"]),
    "untied without a head": (configure(tie_word_embeddings=False), ["lm_head.weight", "is missing"]),
    "unexpected tensor": (add("model.layers.9.mlp.up_proj.weight"), ["model.layers.9.mlp.up_proj.weight", "no place"]),
    "mis-shaped tensor": (reshape, ["model.layers.0.mlp.up_proj.weight", "[64, 128]", "[128, 64]"]),
    "an adapter": (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), ["adapter", "merge"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(folder: Path, name: str):
    break_it, words = BROKEN[name]
    break_it(folder)
    line = refusal(folder)
    assert str(folder) in line
    assert [word for word in words if word not in line] == []


def test_values_are_read_only_on_request(folder: Path):
    poison(float("nan"))(folder)
    assert inspect_checkpoint(folder, check_values=False).layers == 2


def test_a_constant_that_transformers_makes_anew_may_hold_what_it_likes(folder: Path):
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    stored = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((8,), torch.nan)}
    save_file(tensors | stored, folder / WEIGHTS, {"format": "pt"})
    assert inspect_checkpoint(folder).layers == 2


def test_a_bad_value_is_found_in_any_chunk(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensors, "_CHUNK", 100)
    poison(float("nan"))(folder)
    assert UP in refusal(folder)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_truncation_is_refused(folder: Path, tiny_checkpoint: Path, data: st.DataObject):
    whole = (tiny_checkpoint / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert WEIGHTS in refusal(folder)
    assert missing_part(Listing.of(folder)) is not None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2000), value=st.integers(0, 255))
def test_a_changed_header_is_accepted_or_refused_but_never_crashes(folder: Path, tiny_checkpoint: Path, at: int, value: int):
    content = bytearray((tiny_checkpoint / WEIGHTS).read_bytes())
    content[at] = value
    (folder / WEIGHTS).write_bytes(content)
    try:
        inspect_checkpoint(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)


class Payload:
    """Pickled, it runs a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_is_inspected_where_allowed_and_never_run(folder: Path, tiny_checkpoint: Path, tmp_path: Path):
    as_pickle(folder)
    assert inspect_checkpoint(folder, allow_pickle=True).parameters == inspect_checkpoint(tiny_checkpoint).parameters
    (folder / PICKLE).write_bytes(pickle.dumps({"model.norm.weight": Payload(tmp_path / "ran")}))
    assert "not a pickle of plain tensors" in refusal(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("kind", "told"), [("meta", r"without values \(meta\)"), ("sparse", "in the layout torch.sparse_coo")])
def test_a_pickled_tensor_that_holds_no_plain_values_is_named(tmp_path: Path, kind: str, told: str):
    import torch

    tensor = torch.ones(2, 2)
    torch.save({"a": tensor, "b": tensor.to("meta") if kind == "meta" else tensor.to_sparse()}, tmp_path / PICKLE)
    with pytest.raises(CheckpointError, match=f"tensor b was saved {told}; save the model by save_pretrained"):
        tensors.load_pickle(tmp_path / PICKLE)


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM
class TinyConfig(LlamaConfig):
    model_type = "tiny-custom"
class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig
"""


def test_code_of_its_own_runs_only_where_it_is_trusted(folder: Path):
    (folder / "modeling_tiny.py").write_text(CUSTOM)
    maps = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    edit(folder / "config.json", model_type="tiny-custom", architectures=["TinyForCausalLM"], auto_map=maps)
    assert "trust_remote_code" in refusal(folder)
    info = inspect_checkpoint(folder, trust_remote_code=True)
    assert (info.architecture, info.layers) == ("TinyForCausalLM", 2)
    listing = Listing.of(folder)
    assert "modeling_tiny.py" not in needed_files(listing, find_weights(listing))
    assert "modeling_tiny.py" in needed_files(listing, find_weights(listing), trust_remote_code=True)


def test_a_checkpoint_is_complete_once_its_last_byte_has_arrived(folder: Path, tmp_path: Path):
    shard(folder)
    needed = {"config.json", "tokenizer.json", INDEX, *(path.name for path in folder.glob("model-*"))}
    arriving = tmp_path / "arriving"
    arriving.mkdir()
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        (arriving / path.name).write_bytes(content[:-2])  # the last byte may be a line end, which nothing needs
        assert missing_part(Listing.of(arriving)) is not None
        (arriving / path.name).write_bytes(content)
        needed.discard(path.name)
        assert (missing_part(Listing.of(arriving)) is None) == (not needed)
    assert inspect_checkpoint(arriving).layers == 2


def test_what_is_missing_is_said(folder: Path):
    assert missing_part(Listing.of(folder)) is None
    (folder / WEIGHTS).unlink()
    assert "holds no weights" in str(missing_part(Listing.of(folder)))
