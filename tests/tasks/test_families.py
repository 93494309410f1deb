"""Encoder-decoders and encoders on their engines: scored, timed and used like decoders, and held to transformers itself."""

from __future__ import annotations

import shutil
from functools import cache
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import pytest

from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.measure.measurement import Comparison, Measurement
from featherweight.measure.spec import ChangedAnswersSpec, ReferencesSpec, RequestsSpec, WorkloadSpec
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.quantization.spec import QuantizeSpec
from featherweight.registry.generator import Generator
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.parity import load_reference
from featherweight.runtimes.workload import Workload
from featherweight.store.served_folder import Serving
from featherweight.text.documents import Document, read_documents, write_documents
from featherweight.text.model_inputs import scoring_windows, sources_and_targets
from featherweight.text.tokens import Frame, Window
from tasks.evaluate import evaluate
from tasks.export import export
from tasks.quantize import quantize
from tests.support.families import family_checkpoint, sentence
from tests.support.serving_models import exported, opened, score, serving_spec, windows_of

SEQ2SEQ = ("t5", "mt5", "mbart", "m2m_100", "marian")
ENCODERS = ("bert", "distilbert", "roberta")
NEW = 12
EngineName = Literal["torch", "ctranslate2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences and their translations into the same words backwards."""
    folder = tmp_path_factory.mktemp("text")
    sentences = [sentence(start, 9 + start % 5) for start in range(12)]
    pairs = [Document(str(i), line, " ".join(reversed(line.split()))) for i, line in enumerate(sentences)]
    write_documents(folder, pairs)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of a model type, made once."""

    @cache
    def get(kind: str) -> Path:
        # M2M100 gives padding no position, and begins with another token; what a wilder T5 says moves with any rounding.
        changes = {"m2m_100": {"decoder_start_token_id": 2}, "t5": {"initializer_factor": 0.7}}.get(kind, {})
        return family_checkpoint(kind, tmp_path_factory.mktemp(kind) / "checkpoint", **changes)

    return get


def served(checkpoint: Path, text: Path, out: Path, engine: EngineName = "torch") -> Path:
    return exported(checkpoint, text, out, engine=engine)[0]


def labelled(window: Window, mask: int | None) -> dict[str, Any]:
    """What transformers' model takes for the loss of a window: of an encoder, which has a `mask` token, of its masked tokens."""
    import torch

    source, ids = torch.tensor([window.source]), torch.tensor([window.ids])
    if mask is None:
        return {"input_ids": source, "decoder_input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    return {"input_ids": source, "labels": ids.masked_fill(source != mask, -100)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "engine"),
    [*((kind, engine) for kind in SEQ2SEQ for engine in ("torch", "ctranslate2")), *((kind, "torch") for kind in ENCODERS)],
)
def test_a_window_is_scored_as_transformers_scores_it(
    checkpoint: Any, text: Path, tmp_path: Path, kind: str, engine: EngineName, without_parity: None
) -> None:
    import torch

    model, windows = windows_of(checkpoint(kind), text)
    mask = load_tokenizer(checkpoint(kind)).mask_token_id if kind in ENCODERS else None
    if mask is None:
        windows[0].ids.pop()  # a target that was cut has no end token
    rows = score(opened(served(checkpoint(kind), text, tmp_path / "served", engine)), windows)
    for window, row in zip(windows, rows, strict=True):
        given = labelled(window, mask)
        assert len(row) == (given["labels"] != -100).sum() >= 1
        with torch.no_grad():
            assert -sum(row) == pytest.approx(model(**given).loss.item() * len(row), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_a_target_counts_the_bytes_of_its_text(checkpoint: Any, text: Path, kind: str) -> None:
    windows, tokenizer = windows_of(checkpoint(kind), text)[1], load_tokenizer(checkpoint(kind))
    assert [w.text_bytes for w in windows] == [len(tokenizer.decode(w.ids[1:], skip_special_tokens=True)) for w in windows]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENCODERS)
def test_the_same_tokens_are_masked_every_time(checkpoint: Any, text: Path, kind: str) -> None:
    windows, frame = windows_of(checkpoint(kind), text)[1], Frame.of(load_tokenizer(checkpoint(kind)))
    assert windows == windows_of(checkpoint(kind), text)[1]
    for window in windows:
        assert window.ids[: len(frame.lead)] == frame.lead
        assert window.ids[-len(frame.tail) :] == frame.tail


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """What `.generate` writes where nothing ends a text, the decoder's start token left out."""
    import torch

    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 1}
    return model.generate(torch.tensor([prompt]), **options)[0, 1:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_a_target_is_written_as_transformers_writes_it(
    checkpoint: Any, text: Path, tmp_path: Path, kind: str, engine: EngineName, without_parity: None
) -> None:
    model, windows = windows_of(checkpoint(kind), text)
    prompts = [window.source for window in windows[:3]]
    writer = opened(served(checkpoint(kind), text, tmp_path / "served", engine))
    expected = [greedy(model, prompt) for prompt in prompts]
    found = writer.generate(prompts, NEW)
    assert found.tokens == expected and 0 < found.timing.ttft_s < found.timing.total_s
    assert writer.generate(prompts[:1], 1).tokens == [expected[0][:1]]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
def test_a_language_that_the_checkpoint_forces_comes_first(
    text: Path, tmp_path: Path, engine: EngineName, without_parity: None
) -> None:
    from transformers import GenerationConfig

    folder = family_checkpoint("mbart", tmp_path / "mbart")
    GenerationConfig.from_pretrained(folder, forced_bos_token_id=9).save_pretrained(folder)
    model, windows = windows_of(folder, text)
    prompt = windows[0].source
    found = opened(served(folder, text, tmp_path / "served", engine)).generate([prompt], NEW).tokens
    assert found == [greedy(model, prompt)] and found[0][0] == 9


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_the_workload_means_for_each_family_what_it_does(checkpoint: Any, text: Path, tmp_path: Path, kind: str) -> None:
    baseline, out = served(checkpoint(kind), text, tmp_path / "served"), tmp_path / "out"
    out.mkdir()
    spec = WorkloadSpec(prompt_tokens=8, new_tokens=10, batch_sizes=(2,), rounds=2, windows=4, window_tokens=32, threads=(1,))
    asked = {"changed_answers": ChangedAnswersSpec(prompts=3, new_tokens=4)} if kind == "t5" else {}
    if asked and find_spec("sacrebleu"):
        asked |= {"references": ReferencesSpec(texts=5, new_tokens=7, metrics=("bleu", "chrf"))}
    if kind == "bert":
        asked["requests"] = RequestsSpec(rate=100, seconds=0.1, rounds=2, patience_s=600, batch_window_s=(0, 0.001))
    spec = spec.model_copy(update=asked)
    metrics = evaluate(spec, served=baseline, baseline=baseline, evaluation=text, out=out)
    counted = 10 if kind == "t5" else 8
    assert metrics["tokens_per_s_2"] == pytest.approx(2 * counted / metrics["p50_latency_s_2"])
    assert 0 < metrics["ttft_s_2"] <= metrics["p50_latency_s_2"] * (1 + 1e-9), "the last bit is that of two ways to halve"
    assert metrics["bits_per_byte"] > 0 and metrics["windows"] == 4
    if kind == "bert":
        assert metrics["done_rate_100"] == 1.0 and metrics["p50_latency_s_rate_100"] > 0 and metrics["served_per_s_rate_100"] > 0
        assert "p50_ttft_s_rate_100" not in metrics, "it writes no tokens"
    if kind == "t5":
        model, tokenizer = load_reference(checkpoint("t5")), load_tokenizer(checkpoint("t5"))
        written = [greedy(model, one.source)[:4] for one in scoring_windows(checkpoint("t5"), model.config, text, 28, 3)]
        until_end = [list(takewhile(lambda token: token != tokenizer.eos_token_id, ids)) for ids in written]
        assert Comparison.read(out).variant.answers == tuple(tokenizer.decode(ids) for ids in until_end)
    if "references" in asked:
        check_references(spec, Comparison.read(out).variant, metrics, checkpoint("t5"), text)


def check_references(spec: WorkloadSpec, found: Measurement, metrics: Any, checkpoint: Path, text: Path) -> None:
    """The texts are transformers', their scores what sacrebleu says of them and the documents' whole targets."""
    from sacrebleu.metrics import BLEU, CHRF

    model, tokenizer = load_reference(checkpoint), load_tokenizer(checkpoint)
    ends = tokenizer.eos_token_id
    written = [greedy(model, one.source)[:7] for one in scoring_windows(checkpoint, model.config, text, 64, 5)]
    until_end = [list(takewhile(lambda token: token != ends, ids)) for ids in written]
    assert found.written == tuple(tokenizer.decode(ids, skip_special_tokens=True) for ids in until_end)
    targets = {document.text: document.target for document in read_documents(text)}
    sources = [one for one, _ in sources_and_targets(checkpoint, text, 64, 5)]
    wanted = [targets[tokenizer.decode(ids, skip_special_tokens=True)] for ids in sources]
    assert metrics["bleu"] == pytest.approx(BLEU().corpus_score(list(found.written), [wanted]).score)
    assert metrics["chrf"] == pytest.approx(CHRF().corpus_score(list(found.written), [wanted]).score)
    assert list(Workload.read(spec, checkpoint, text).references) == wanted
    assert metrics["references"] == 5 and metrics["reference_loss"] == metrics["reference_loss_high"] == 0.0


@pytest.mark.engine
def test_text_goes_in_and_its_translation_or_its_filled_masks_come_out(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    import torch

    translator = Generator(served(checkpoint("t5"), text, tmp_path / "t5"))
    tokenizer, model = load_tokenizer(checkpoint("t5")), load_reference(checkpoint("t5"))
    ids = tokenizer("the little fox sang").input_ids
    expected = tokenizer.decode(greedy(model, ids), skip_special_tokens=True)
    assert translator(["the little fox sang"], max_new_tokens=NEW, stop_at_end=False) == [expected]
    translator.close()
    filler = Generator(served(checkpoint("bert"), text, tmp_path / "bert"))
    tokenizer, model = load_tokenizer(checkpoint("bert")), load_reference(checkpoint("bert"))
    prompts = ["the <mask> fox  sang and <mask>", "no mask here"]
    ids = torch.tensor([tokenizer(prompts[0]).input_ids])
    with torch.no_grad():
        best = model(ids).logits.argmax(-1)[ids == tokenizer.mask_token_id]
    first, second = (tokenizer.decode([token]).removeprefix("##") for token in best.tolist())
    assert filler(prompts) == [f"the {first} fox  sang and {second}", prompts[1]]
    filler.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "marian", "bert", "xlm-roberta", "distilbert"])
@pytest.mark.parametrize("method", ["rtn", "qat"])
def test_every_linear_of_a_block_and_the_vocabulary_are_quantized(
    checkpoint: Any, text: Path, tmp_path: Path, kind: str, method: Literal["rtn", "qat"]
) -> None:
    from featherweight.model.architecture import blocks

    training = {"start": "rtn", "steps": 2, "batch": 2} if method == "qat" else {}
    spec = QuantizeSpec.model_validate({"method": method, "sequence": 16, "samples": 4, **training})
    metrics = quantize(spec, checkpoint=checkpoint(kind), text=text, calibration=text, out=tmp_path)
    assert abs(metrics["loss_after"] - metrics["loss_before"]) < 0.05 * metrics["loss_before"]
    quantized, model = QuantizedWeights.read(tmp_path), load_reference(tmp_path)
    assert quantized
    every = [attention for block in blocks(model) for attention in block.attentions]
    linears = {id(linear.weight) for one in every for linear in (one.q, one.k, one.v, one.o)}
    linears |= {id(linear.weight) for b in blocks(model) for linear in (*b.feed_forward.inputs, b.feed_forward.output)}
    names = {name: weight for name, weight in model.named_parameters(remove_duplicate=False) if name in quantized.q}
    assert {id(weight) for weight in names.values()} == linears | {id(model.get_input_embeddings().weight)}
    assert quantized.grid == quantized.head == "int8"
    for name, weight in names.items():
        assert weight.equal(quantized.dequantize(name))


def test_a_t5_with_a_head_of_its_own_keeps_it_on_its_grid(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source, out = Path(shutil.copytree(checkpoint("t5"), tmp_path / "source")), tmp_path / "out"
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    head = torch.randn(tensors["shared.weight"].shape)
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors", {"format": "pt"})
    quantize(QuantizeSpec.of(sequence=16, samples=4), checkpoint=source, text=text, calibration=text, out=out)
    found = load_reference(out).get_output_embeddings().weight
    assert torch.allclose(found, head, atol=head.abs().max().item() / 200)
    assert not torch.allclose(found, tensors["shared.weight"], atol=0.1)


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["t5", "mbart"])
def test_quantized_translators_are_packed_as_they_are(checkpoint: Any, text: Path, tmp_path: Path, kind: str) -> None:
    """Parity holds the packed integers to 0.001 nats with float activations, and the int8 engine to its own bound."""
    rounded, out = tmp_path / "rounded", tmp_path / "served"
    rounded.mkdir()
    out.mkdir()
    grid = QuantizeSpec.of(grid="int8-reduced", head="int8-reduced", sequence=16, samples=4)
    quantize(grid, checkpoint=checkpoint(kind), text=text, calibration=text, out=rounded)
    spec = serving_spec(engine="ctranslate2", compute_type="int8")
    metrics = export(spec, checkpoint=rounded, calibration=text, out=out)
    assert metrics["parity_weights_max_abs"] < 1e-3 and metrics["parity_mean_abs"] < metrics["parity_bound"]
    assert Serving.read(out).grid == "int8-reduced"


@pytest.mark.engine
def test_an_encoder_is_compiled_as_a_whole(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    if reason := RUNTIMES["torch-compile"].missing():
        pytest.skip(reason)
    _, windows = windows_of(checkpoint("bert"), text)
    shutil.copytree(checkpoint("bert"), tmp_path / "served")
    Serving("torch-compile").write(tmp_path / "served")
    prompts = [windows[0].source, windows[0].ids]
    found = opened(tmp_path / "served").generate(prompts, 0)
    assert found.tokens == opened(served(checkpoint("bert"), text, tmp_path / "plain")).generate(prompts, 0).tokens
    assert found.timing.total_s >= found.timing.ttft_s > 0
