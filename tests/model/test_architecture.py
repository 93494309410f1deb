"""The structure of every model type in the table, on tiny random models, and what they read and predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import StageError
from featherweight.model.architecture import LAYOUTS, attention_options, auto_class, blocks, family_of, stacks
from featherweight.text.documents import Document, write_documents
from featherweight.text.model_inputs import IGNORED, example_blocks, inputs_and_labels
from featherweight.training.losses import mean_loss, token_loss
from tests.support.families import FAMILIES, family_checkpoint, tiny_model

pytestmark = pytest.mark.slow

VOCABULARY = 64


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_finds_the_stacks_of_every_model_type(model_type: str) -> None:
    model = tiny_model(model_type, vocab_size=VOCABULARY)
    found = stacks(model)
    assert [stack.role for stack in found] == {"causal": ["decoder"], "encoder": ["encoder"]}.get(
        family_of(model.config), ["encoder", "decoder"]
    )
    for stack in found:
        assert len(stack.blocks) == len(stack.layers) == getattr(model.config, stack.count)
        for block in stack.blocks:
            assert model.get_submodule(block.name) is block.module
            assert len(block.attentions) == (2 if family_of(model.config) == "seq2seq" and stack.role == "decoder" else 1)
            assert all((one.heads, one.head_dim) == (4, 8) for one in block.attentions)
            assert all(one.o.in_features == 32 for one in block.attentions)
            assert all(linear.out_features == 48 for linear in block.feed_forward.inputs)
            assert block.feed_forward.output.in_features == 48
    assert len(blocks(model)) == 2 * len(found)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_every_big_matrix_of_a_block_is_accounted_for(model_type: str) -> None:
    from torch import nn

    for block in blocks(tiny_model(model_type, vocab_size=VOCABULARY)):
        known = {part for one in block.attentions for part in (one.q, one.k, one.v, one.o)}
        known |= {*block.feed_forward.inputs, block.feed_forward.output}
        assert {module for module in block.module.modules() if isinstance(module, nn.Linear)} == known


def test_of_several_classes_the_one_that_the_config_names_is_taken() -> None:
    from transformers import FunnelConfig

    from featherweight.model.architecture import head_class

    named = {name: head_class(FunnelConfig(architectures=[name])).__name__ for name in ("FunnelBaseModel", "FunnelModel")}
    assert named == {"FunnelBaseModel": "FunnelBaseModel", "FunnelModel": "FunnelModel"}
    assert head_class(FunnelConfig(architectures=["Another"])).__name__ == "FunnelModel"


def test_an_unknown_structure_is_refused_by_name() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    assert family_of(model.config) == "causal"
    with pytest.raises(StageError, match="'gpt2' model is not known"):
        stacks(model)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    stories = [f"Once upon a time the fox number {number} met a bear. They ran, and ran, and were glad." for number in range(40)]
    write_documents(folder, [Document(str(number), story) for number, story in enumerate(stories)])
    return folder


def test_blocks_say_what_is_read_and_what_is_predicted(checkpoint: Path, text: Path) -> None:
    model = _open(checkpoint)
    ids = example_blocks(checkpoint, model.config, text, 16, limit=8, seed=1)
    inputs, labels = inputs_and_labels(model.config, ids)
    assert ids.shape == (8, 16 if family_of(model.config) == "causal" else 32)
    logits = model(**inputs).logits
    assert logits.shape[:2] == labels.shape
    known = labels != IGNORED
    expected = -logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][known].mean()
    assert token_loss(model, ids).item() == pytest.approx(expected.item(), abs=1e-5)
    assert mean_loss(model, ids, batch=3) == pytest.approx(expected.item(), abs=1e-5)


def test_masks_hide_a_seventh_of_the_words_and_no_special_token(text: Path, tmp_path: Path) -> None:
    checkpoint = family_checkpoint("bert", tmp_path)
    ids = example_blocks(checkpoint, _open(checkpoint).config, text, 32, limit=40, seed=3)
    source, target = ids.chunk(2, dim=1)
    hidden = source != target
    tokenizer = load_tokenizer(checkpoint)
    assert (source[hidden] == tokenizer.mask_token_id).all()
    assert 0.1 < hidden.float().mean() < 0.2
    assert hidden.any(dim=1).all()
    assert not set(target[hidden].tolist()) & set(tokenizer.all_special_ids)


def test_a_document_with_a_target_is_a_pair(tmp_path: Path) -> None:
    checkpoint = family_checkpoint("t5", tmp_path / "t5")
    write_documents(tmp_path / "text", [Document("a", "the fox ran", "ran the fox")])
    config = _open(checkpoint).config
    source, target = example_blocks(checkpoint, config, tmp_path / "text", 24).chunk(2, dim=1)
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.decode(source[0], skip_special_tokens=True) == "the fox ran"
    assert tokenizer.decode(target[0], skip_special_tokens=True) == "ran the fox"
    inputs, labels = inputs_and_labels(config, example_blocks(checkpoint, config, tmp_path / "text", 24))
    assert inputs["attention_mask"].sum() == (source != tokenizer.pad_token_id).sum()
    assert (labels == IGNORED).sum() == (target == tokenizer.pad_token_id).sum()


@pytest.mark.parametrize("model_type", ["t5", "umt5"])
def test_no_decoder_sees_a_token_that_follows(model_type: str) -> None:
    import torch
    from transformers import AutoConfig

    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = AutoConfig.for_model(model_type, **sizes, decoder_start_token_id=0)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, **attention_options(config)).eval()
    source = torch.arange(5, 25)[None]
    targets = [torch.tensor([[0, 7, 9, 11, last]]) for last in (13, 50)]
    with torch.inference_mode():
        before, after = (model(input_ids=source, decoder_input_ids=target).logits[0] for target in targets)
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


def _open(checkpoint: Path) -> Any:
    from featherweight.checkpoint.opening import load_model

    return load_model(checkpoint).eval()
