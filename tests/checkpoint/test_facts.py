"""What a folder alone tells is told in the plan, in one line that says what to do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from featherweight.checkpoint.facts import read_facts
from featherweight.checkpoint.files import INDEX, WEIGHTS
from featherweight.checkpoint.opening import load_model
from featherweight.checkpoint.spec import LoadSpec
from featherweight.checkpoint.tensors import load_pickle
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import CheckpointError
from featherweight.recipe.facts import Facts
from featherweight.recipe.recipe import Recipe
from tests.conftest import S3Server
from tests.support.gguf_files import write_gguf


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def told(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_facts(LoadSpec(source=str(folder)))
    assert "\n" not in str(error.value)
    return str(error.value)


def configured(**entries: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def without(part: str) -> Callable[[Path], None]:
    """No layer has a tensor of that name."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({name: tensor for name, tensor in tensors.items() if part not in name}, folder / WEIGHTS, {"format": "pt"})

    return change


def renamed(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / name)

    return change


def marked(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def in_shards(place: str, *more: str) -> Callable[[Path], None]:
    """One shard, at `place`, and an index that has these tensors more."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        (folder / place).parent.mkdir(exist_ok=True)
        save_file(tensors, folder / place, {"format": "pt"})
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys([*tensors, *more], place)}))

    return change


def in_json(name: str, **entries: object) -> Callable[[Path], None]:
    """Entries more, or others, of a file that may not be there yet."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | entries))

    return change


def dropping(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    in_json("tokenizer.json", model=model | {"dropout": 0.1})(folder)


BEYOND = "the tokenizer has ids up to 320, but the embedding has only 320 rows"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (in_json("tokenizer_config.json", extra_special_tokens={"image_token": "<image>"}), BEYOND),
        (in_json("tokenizer_config.json", additional_special_tokens=["<image>"]), BEYOND),
        (in_json("tokenizer_config.json", pad_token="[PAD]"), BEYOND),
        (in_json("special_tokens_map.json", pad_token="[PAD]"), BEYOND),
        (in_json("added_tokens.json", **{"<image>": 320}), BEYOND),
        (in_json("tokenizer_config.json", tokenizer_class="T5Tokenizer"), "the tokenizer does not load: "),
        (in_json("tokenizer.json", pre_tokenizer={"type": "Martian"}), "the tokenizer does not load: "),
        (in_json("tokenizer_config.json", model_max_length="512"), "the tokenizer loads, and cuts no text: '>' not supported"),
        (
            dropping,
            'tokenizer.json: its BPE has a dropout of 0.1, by which it cuts a text otherwise each time; write "dropout": null',
        ),
    ],
)
def test_tokenizers(change: Callable[[Path], None], reason: str, folder: Path) -> None:
    """Each was told at load alone, after a plan that promised to serve it."""
    change(folder)
    assert reason in told(folder)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template."),
        ("{{ raise_exception('give a document') }}", "give a document"),
        ("{% if messages|length > 1 %}{{ raise_exception('one question') }}{% endif %}{{ messages[0].content }}", "one question"),
        ([{"name": "rag", "template": "{{ messages[0].content }}"}], "multiple chat templates with no default"),
    ],
)
def test_a_chat_template_that_writes_no_conversation_is_told_in_the_plan(
    template: object, reason: str | None, folder: Path
) -> None:
    """It was told by the first conversation that was served; prompts are answered whatever the template is."""
    in_json("tokenizer_config.json", chat_template=template)(folder)
    wanted = {"checkpoint": {"source": str(folder)}, "name": "try", "data": {"source": "text"}, "promote": {"model": "try"}}
    (*notes,) = Facts.read(Recipe.model_validate(wanted)).notes
    assert [reason in note for note in notes if reason] == ([True] if reason else [])
    assert bool(notes) == bool(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (in_json("tokenizer_config.json", pad_token="[PAD]"), BEYOND),
        (in_json("tokenizer.json", pre_tokenizer={"type": "Martian"}), "the tokenizer does not load: "),
    ],
)
def test_tokenizers_far_away_are_opened_too(change: Callable[[Path], None], reason: str, folder: Path, s3_server: S3Server) -> None:
    """The tokenizer's files alone are fetched for it; errors name the place that was asked for."""
    change(folder)
    shutil.copytree(folder, s3_server.folder / "m")
    source = f"s3://{s3_server.bucket}/m"
    with pytest.raises(CheckpointError, match=re.escape(reason)) as raised:
        read_facts(LoadSpec(source=source))
    assert str(raised.value).startswith(f"{source}: ")


def test_a_chat_template_far_away_is_told_in_the_plan(folder: Path, s3_server: S3Server) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    shutil.copytree(folder, s3_server.folder / "m")
    opened = read_facts(LoadSpec(source=f"s3://{s3_server.bucket}/m")).opened
    assert opened and (opened.chat, opened.lead) == ("no", (0,))


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_tokenizer_is_looked_into_by_a_process_of_its_own_without_torch(kind: str, folder: Path) -> None:
    (lead,) = load_tokenizer(folder)("a")["input_ids"][:1]
    place = folder if kind == "folder" else write_gguf(folder.with_name("m.gguf"), folder)[0]
    asked = (
        "import sys\nfrom pathlib import Path\nfrom featherweight.checkpoint.dry_tokenizer import tokenizer_facts\n"
        "assert tokenizer_facts(Path(sys.argv[1]), 320).lead == (int(sys.argv[2]),)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "tokenizer_facts(Path(sys.argv[1]), 319)"
    )
    told = subprocess.run([sys.executable, "-c", asked, str(place), str(lead)], capture_output=True, text=True, check=False)
    assert told.stderr.splitlines()[-1].endswith("or take the tokens beyond it out of the tokenizer's files")


def test_a_plan_looks_into_whatever_is_brought_without_loading_torch(folder: Path, tmp_path: Path) -> None:
    """Other tests have loaded it before, and so take other ways: a program that begins by planning has not."""
    settings = LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(folder))
    get_peft_model(load_model(folder), settings).save_pretrained(tmp_path / "adapter")
    sources = [folder, tmp_path / "adapter", *write_gguf(tmp_path / "m.gguf", folder)]
    asked = (
        "import sys\nfrom featherweight.checkpoint.facts import read_facts\nfrom featherweight.checkpoint.spec import LoadSpec\n"
        "for source in sys.argv[1:]: assert read_facts(LoadSpec(source=source)).opened\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", asked, *map(str, sources)], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (configured(attention_bias=True), "tensor self_attn.k_proj.bias of layer 0 is missing (and 3 more of this layer)"),
        (configured(model_type="gpt2", n_head=-1), "n_head is -1; no model has fewer than none"),
        (configured(attention_dropout=1.5), "attention_dropout is 1.5, and must be from 0 to 1"),
        (configured(model_type="t5", dropout_rate=-0.1), "dropout_rate is -0.1, and must be from 0 to 1"),
        (without("up_proj"), "tensor model.layers.0.mlp.up_proj.weight of LlamaForCausalLM is missing (and 1 more); copy it again"),
        (without("input_layernorm"), "tensor model.layers.0.input_layernorm.weight of LlamaForCausalLM is missing (and 1 more)"),
        (configured(head_dim=0), "describes no model that transformers can build: 0.0 cannot be raised to a negative power"),
        (configured(model_type="llamas"), "knows no model type 'llamas'; did you mean 'llama'?"),
        (configured(model_type="clip", architectures=["CLIPModel"]), "a clip model (CLIPModel) is none that transformers reads"),
        (configured(model_type="whisper", architectures=["WhisperModel"], is_encoder_decoder=True), "a whisper model"),
        (configured(dtype="auto"), "dtype is 'auto', and must be one of float32, float16"),
        (configured(dtype={"": "float16"}), "dtype is {'': 'float16'}"),
        (configured(dtype="torch.float16"), "dtype is 'torch.float16', and must be one of float32, float16"),
        (
            configured(quantization_config={"quant_method": "hqq"}),
            "names the quant_method 'hqq', and the weights are floats; take it",
        ),
        (configured(rms_norm_eps=float("nan")), "rms_norm_eps is NaN"),
        (configured(pad_token_id=512), "config.json: pad_token_id is 512, and the vocabulary has 320 tokens; say one"),
        (marked, "begins with a byte order mark; save it as plain UTF-8"),
        (renamed("weights.safetensors"), f"a file of its own is to be called {WEIGHTS}"),
        (renamed("model-00001-of-00001.safetensors"), f"a shard wants {INDEX}"),
        (renamed("consolidated.00.pth"), "consolidated.00.pth is a pickle"),
        (renamed("tf_model.h5"), "tf_model.h5 is of another framework"),
        (in_shards("below/one.safetensors"), "below/one.safetensors, which does not lie right in the folder"),
        (in_shards("one.safetensors", "model.extra"), "lacks tensor model.extra, which the shard index puts there"),
    ],
)
def test_folders(change: Callable[[Path], None], reason: str, folder: Path) -> None:
    change(folder)
    assert reason in told(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (torch.nn.Linear(2, 2), r"it wants torch\.nn\.modules\.linear\.Linear to be run\); it was not loaded$"),
        (
            {"state_dict": {"weight": torch.ones(2)}},
            "and 'state_dict' is none; .*: save the model's state_dict alone",
        ),
        (None, "it is empty, or cut short"),
    ],
)
def test_pickles_that_hold_something_else(content: object, reason: str, tmp_path: Path) -> None:
    """torch's own text advises to run whatever the file holds."""
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"") if content is None else torch.save(content, path)
    with pytest.raises(CheckpointError, match=reason):
        load_pickle(path)


def without(*endings: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(endings)}
        save_file(kept, folder / WEIGHTS, {"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (configured(vocab_size=100), r"embed_tokens\.weight has shape \[\d+, 64\], but config\.json asks for \[100, 64\]"),
        (configured(intermediate_size=100), r"(down|gate|up)_proj\.weight has shape .*, but config\.json asks for \["),
        (configured(num_key_value_heads=4), r"[kv]_proj\.weight has shape \[32, 64\], but config\.json asks for \[64, 64\]"),
        (configured(num_hidden_layers=3), r"tensor input_layernorm\.weight of layer 2 is missing \(and 8 more of this layer\)"),
        (configured(num_hidden_layers=1), "its tensors are of 2 layers, but config.json asks for 1"),
        (without("layers.1.mlp.up_proj.weight"), r"tensor mlp\.up_proj\.weight of layer 1 is missing; copy it again"),
        (configured(hidden_act="superlu"), "it knows no hidden_act 'superlu'"),
    ],
)
def test_tensors_that_config_json_does_not_ask_for(change: Callable[[Path], None], reason: str, folder: Path) -> None:
    """They were told once the weights had been brought here."""
    change(folder)
    assert re.search(reason, told(folder))


@pytest.mark.parametrize("prefix", ["", "module._orig_mod.model.", "base_model.model.model."])
def test_tensors_of_other_names_are_known_by_their_places(prefix: str, folder: Path) -> None:
    tensors = {prefix + name.removeprefix("model."): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    assert read_facts(LoadSpec(source=str(folder))).model_type == "llama"
