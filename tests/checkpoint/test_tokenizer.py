"""Tokenizers as people have them reach every stage's folder whole, or the stage stops."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from featherweight.checkpoint.files import COMPANIONS, VOCABULARIES, Listing, has_tokenizer, is_companion
from featherweight.checkpoint.opening import load_model
from featherweight.checkpoint.saving import copy_companions, copy_tokenizer, link_checkpoint, save_model
from featherweight.checkpoint.spec import LoadSpec
from featherweight.checkpoint.tokenizer import SAMPLE, load_tokenizer, require_same_tokenizer
from featherweight.errors import CheckpointError
from featherweight.quantization.spec import QuantizeSpec
from featherweight.runtimes.spec import ExportSpec
from featherweight.training.spec import FinetuneSpec
from tasks.export import export
from tasks.finetune import finetune
from tasks.load import load
from tasks.quantize import quantize
from tests.support.families import write_pairs
from tests.support.slow_tokenizers import KINDS, slow_checkpoint

TASKS = {"bert": "fill-mask", "gpt2": "text-generation"}


def test_the_list_holds_every_file_that_a_tokenizer_of_transformers_names() -> None:
    from transformers.tokenization_utils_base import ADDED_TOKENS_FILE, SPECIAL_TOKENS_MAP_FILE, TOKENIZER_CONFIG_FILE
    from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

    named = {CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, f"{CHAT_TEMPLATE_DIR}/tool_use.jinja"}
    named |= {ADDED_TOKENS_FILE, SPECIAL_TOKENS_MAP_FILE, TOKENIZER_CONFIG_FILE}
    root = Path(importlib.import_module("transformers").__file__ or "").parent
    modules = sorted((root / "models").glob("*/tokenization_*.py"))
    assert len(modules) > 60
    for path in modules:
        try:
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        except (ImportError, NameError):  # wants a library of music
            continue
        classes = [value for value in vars(module).values() if isinstance(value, type)]
        named |= {str(file) for found in classes for file in getattr(found, "vocab_files_names", {}).values()}
    assert [name for name in sorted(named) if not is_companion(name)] == []


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "training_args.bin", "a/tokenizer.json", "README.md", "optimizer.pt"]
)
def test_and_nothing_that_is_not_the_tokenizers(name: str) -> None:
    assert not is_companion(name)


def test_a_tokenizer_of_bytes_needs_no_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    assert not has_tokenizer(Listing.of(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert has_tokenizer(Listing.of(tmp_path))
    assert set(VOCABULARIES) <= set(COMPANIONS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("text"))


def cuts(folder: Path) -> list[Any]:
    """The ids of varied texts, as transformers cuts them."""
    tokenizer = load_tokenizer(folder)
    texts = [*SAMPLE, "a little fox met a bear", " ".join(map(str, tokenizer.all_special_tokens))]
    return [[tokenizer(one)["input_ids"], tokenizer(text_target=one)["input_ids"]] for one in texts]


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary_files_alone_go_through_every_stage(kind: str, text: Path, tmp_path: Path) -> None:
    """What a T5, mBART, M2M100 or Marian without tokenizer.json lost in silence: `[7,20,8,8,29,4]` became `[3,2,3,2,3,2]`."""
    source = slow_checkpoint(kind, tmp_path / "source")
    expected = cuts(source)
    assert len({number for one in expected for ids in one for number in ids}) > 20, "a tokenizer that knows nothing proves nothing"
    task = TASKS.get(kind, "text2text-generation")
    loaded, tuned, small, served = (made(tmp_path / name) for name in ("loaded", "tuned", "small", "served"))
    load(LoadSpec(source=str(source), task=task), out=loaded)
    finetune(FinetuneSpec(steps=1, batch=2, sequence=16), checkpoint=loaded, text=text, out=tuned)
    quantize(QuantizeSpec.of(sequence=16, samples=2), checkpoint=tuned, text=text, calibration=text, out=small)
    export(ExportSpec.of(engine="torch"), checkpoint=small, calibration=text, out=served)
    for folder in (loaded, tuned, small, served):
        assert not (folder / "tokenizer.json").exists()
        assert cuts(folder) == expected, folder.name


def test_chat_templates_beside_the_first_are_carried(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tool: {{ messages[0].content }}")
    loaded, saved, served = (made(tmp_path / name) for name in ("loaded", "saved", "served"))
    load(LoadSpec(source=str(source)), out=loaded)
    save_model(load_model(loaded), saved, loaded)
    link_checkpoint(saved, served)
    said = load_tokenizer(source).apply_chat_template([{"role": "user", "content": "hi"}], chat_template="tool_use", tokenize=False)
    assert said == "tool: hi"
    for folder in (loaded, saved, served):
        assert load_tokenizer(folder).chat_template == load_tokenizer(source).chat_template


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "marian", "gpt2"])
def test_a_folder_whose_tokenizer_became_another_is_refused(kind: str, tmp_path: Path) -> None:
    source, out = slow_checkpoint(kind, tmp_path / "source"), made(tmp_path / "out")
    copy_tokenizer(source, out)
    {"t5": _forget_the_pieces, "marian": _swap_the_models, "gpt2": _forget_a_merge}[kind](out)
    with pytest.raises(CheckpointError, match="tokenizer") as error:
        require_same_tokenizer(source, out)
    assert "\n" not in str(error.value)


def _forget_the_pieces(folder: Path) -> None:
    (folder / "spiece.model").unlink()


def _swap_the_models(folder: Path) -> None:
    shutil.copyfile(folder / "target.spm", folder / "source.spm")


def _forget_a_merge(folder: Path) -> None:
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[:-40]) + "\n")


def test_a_tokenizer_that_is_left_over_in_the_target_is_noticed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A tokenizer.json of something else beats the vocabulary files that are copied beside it."""
    source, out = slow_checkpoint("gpt2", tmp_path / "source"), made(tmp_path / "out")
    shutil.copyfile(source / "config.json", out / "config.json")
    shutil.copyfile(tiny_checkpoint / "tokenizer.json", out / "tokenizer.json")
    with pytest.raises(CheckpointError, match="is not the checkpoint's"):
        copy_companions(source, out)


def test_a_changed_special_token_is_noticed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tiny_checkpoint, tmp_path / "out"))
    told = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps(told | {"pad_token": "a", "add_bos_token": True}))
    with pytest.raises(CheckpointError, match="special tokens"):
        require_same_tokenizer(tiny_checkpoint, out)


def test_what_is_loaded_shares_no_bytes_with_the_users_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Bytes written into the user's file later changed the champion in production."""
    source, out = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source")), made(tmp_path / "out")
    load(LoadSpec(source=str(source)), out=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for path in source.iterdir():
        with path.open("r+b") as file:
            file.write(b"overwritten")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
