"""Decoders that answer by vectors or labels: as transformers and sentence-transformers have it, however texts are padded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from featherweight.checkpoint.facts import read_facts
from featherweight.checkpoint.opening import load_config, load_model
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError, DataError
from featherweight.model.architecture import OWN_LABELS, auto_names, head_refusal, task_of
from featherweight.model.heads import answers
from featherweight.registry import served_engine
from featherweight.registry.labeller import Labeller, scored
from featherweight.runtimes import answer_parity
from featherweight.runtimes.candidate import Candidate
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.spec import HEADED, Task
from featherweight.store.served_folder import Serving
from featherweight.text.documents import Document, write_documents
from featherweight.text.examples import packed_inputs
from tests.support import heads
from tests.support.families import SIZES, family_checkpoint
from tests.support.heads import TEXTS, loaded, opened_vectors, tokens
from tests.support.in_process import InProcess
from tests.support.serving_models import exported, opened, serving_spec

pytestmark = pytest.mark.slow

HEADS: dict[str, tuple[Task, dict[str, Any]]] = {
    "labels": ("text-classification", {"num_labels": 3}),
    "number": ("text-classification", {"num_labels": 1}),
    "several": ("text-classification", {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "tags": ("token-classification", {}),
}
TYPES = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": SIZES["llama"] | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 24, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def made(folder: Path, head: str = "labels", model_type: str = "qwen3", **changes: Any) -> Path:
    """A checkpoint of that head, as transformers saves it."""
    task, told = HEADS[head]
    return heads.head_checkpoint(model_type, task, folder, **TYPES[model_type] | told | changes)


def alone(source: Path, task: Task, texts: list[str]) -> list[Any]:
    """What transformers' own class says to each text alone."""
    import torch
    import transformers

    model = getattr(transformers, heads.HEADS[task]).from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    told = [tokenizer(one, return_tensors="pt") for one in texts]
    with torch.no_grad():
        return [model(input_ids=one.input_ids, attention_mask=one.attention_mask).logits[0] for one in told]


def logits(rows: Any, head: str) -> Any:
    """transformers' logits, in our rows (see featherweight/model/heads.py)."""
    import torch

    rows = torch.tensor(rows)
    return rows if head == "tags" else rows[:, 1] if head in ("number", "several") else rows[0]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pad", ["apart", "none", "the end"])
def test_texts_of_any_lengths_together_are_labelled_as_each_alone_by_transformers(tmp_path: Path, head: str, pad: str) -> None:
    """transformers takes the last token that is no padding: of texts that end in that very token the one before it."""
    import torch

    task = HEADS[head][0]
    source = made(tmp_path / "made", head, pad_token_id={"apart": 0, "none": None, "the end": 2}[pad])
    out = loaded(source, tmp_path / "out", task)
    assert task_of(load_config(out)) == task
    right = alone(source, task, TEXTS)
    ids, types = tokens(out, TEXTS)
    Serving("torch").write(out)
    for ours, theirs in zip(opened(out).outputs(ids, types), right, strict=True):
        assert torch.allclose(logits(ours, head), theirs, atol=1e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_labels_of_every_kind_of_decoder(tmp_path: Path, model_type: str) -> None:
    """Positions that are learned, alibi and windows: padded behind, each text is read as it is alone."""
    import torch

    source = made(tmp_path / "made", "labels", model_type)
    right = torch.stack(alone(source, "text-classification", TEXTS))
    out = loaded(source, tmp_path / "out", "text-classification")
    model, (ids, types) = load_model(out).eval(), tokens(out, TEXTS)
    with torch.no_grad():
        assert torch.allclose(answers(model, packed_inputs(model.config, ids, types))[:, 0], right, atol=1e-5)


def test_padding_before_a_text_changes_no_label(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    source = made(tmp_path / "made", "labels")
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    ids = torch.tensor([[0, 0, 0, 1, 9, 2], [1, 8, 9, 10, 11, 2]])
    mask = (ids != 0).long()
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask).logits
        ours = answers(model, {"input_ids": ids, "attention_mask": mask})[:, 0]
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("engine", ["torch-dynamic", "torch-static", "torchao-int8"])
@pytest.mark.parametrize("head", ["labels", "number", "tags"])
def test_rounded_engines_hold_parity(tmp_path: Path, head: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_parity, "open_worker", InProcess)
    source = loaded(made(tmp_path / "made", head), tmp_path / "out", HEADS[head][0])
    write_documents(tmp_path / "text", [Document(str(place), one) for place, one in enumerate(TEXTS * 3)])
    _, metrics = exported(source, tmp_path / "text", tmp_path / "served", engine=engine)
    assert metrics["parity_mean_abs"] < metrics["parity_bound"]
    assert metrics.get("parity_weights_max_abs", 0.0) < 1e-3


def test_the_plan_names_the_task_and_the_engines_that_do_not_take_it(tmp_path: Path) -> None:
    source = made(tmp_path / "made", "labels")
    facts = read_facts(LoadSpec(source=str(source), task="text-classification"))
    assert facts.task == "text-classification"
    for engine in ("ctranslate2", "tvm", "onnxruntime"):
        refusal = Candidate(facts, 24).refusal(RUNTIMES[engine], serving_spec(engine=engine))
        assert "labels texts with encoders alone here, and qwen3 is a decoder; take openvino, llama.cpp, torch" in str(refusal)
    assert Candidate(facts, 24).refusal(RUNTIMES["llama.cpp"], serving_spec(engine="llama.cpp")) is None
    for engine in ("vllm", "onnxruntime-genai"):
        assert RUNTIMES[engine].task_refusal("text-classification")


def test_a_reranker_that_writes_yes_or_no_is_told_what_to_give_instead(tmp_path: Path) -> None:
    source = family_checkpoint("qwen3", tmp_path / "made")
    with pytest.raises(CheckpointError, match=r"set task: text-generation, or give a reranker of two words' logits as a classif"):
        read_facts(LoadSpec(source=str(source), task="text-classification"))


def test_labels_that_are_given_otherwise_are_refused(tmp_path: Path) -> None:
    source = made(tmp_path / "made", "labels")
    told = json.loads((source / "config.json").read_text())
    changes = {"architectures": ["CTRLForSequenceClassification"], "model_type": "ctrl"}
    (source / "config.json").write_text(json.dumps(told | changes))
    with pytest.raises(CheckpointError, match=r"how it labels texts \(CTRLForSequenceClassification\) is not known here; take"):
        read_facts(LoadSpec(source=str(source), task="text-classification"))


def test_every_decoder_that_is_taken_labels_by_its_last_token() -> None:
    """By transformers' own code: a `score` of what its base model says, at the last token that is no padding."""
    import transformers
    from transformers import CONFIG_MAPPING

    auto, folder = auto_names(), Path(transformers.__file__).parent / "models"
    sources = "\n".join(file.read_text() for file in sorted(folder.glob("*/modeling_*.py")))
    taken = []
    for kind, name in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.items():
        config = CONFIG_MAPPING[kind]() if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in OWN_LABELS else None
        if config is None or kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.is_encoder_decoder:
            continue
        config.architectures = [name]
        assert head_refusal(config) is None
        body = sources.partition(f"class {name}(")[2].partition("\nclass ")[0]
        by_last = "self.score(hidden_states" in body and "last_non_pad_token" in body
        assert body.startswith("GenericForSequenceClassification") or by_last, kind
        taken.append(kind)
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3"} <= set(taken)


def embedding_gemma(folder: Path) -> Path:
    """As EmbeddingGemma: Gemma 3 that reads both ways, the mean of all tokens, two layers behind it, length 1, prompts by name."""
    import torch
    from safetensors.torch import save_file

    shape = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "use_bidirectional_attention": True}
    kinds = SIZES["llama"] | {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    source = heads.sentence_files(heads.head_checkpoint("gemma3_text", "feature-extraction", folder, **kinds | shape))
    listed = json.loads((source / "modules.json").read_text())
    for place, (rows, columns) in enumerate([(48, 32), (32, 48)], 2):
        path = source / f"{place}_Dense"
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"activation_function": "torch.nn.modules.linear.Identity", "bias": False}))
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(place))
        save_file({"linear.weight": weight}, path / "model.safetensors")
        listed.insert(place, {"path": path.name, "type": "sentence_transformers.models.Dense"})
    (source / "modules.json").write_text(json.dumps(listed))
    prompts = {
        "prompts": {"query": "the old tree . ", "document": ""},
        "default_prompt_name": None,
        "model_type": "SentenceTransformer",
    }
    (source / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return source


def gemma_vectors(source: Path, texts: list[str]) -> Any:
    """By transformers' own model and the layers in the files, one text at a time."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    rows = []
    for one in texts:
        with torch.no_grad():
            row = model(**tokenizer(one, truncation=True, max_length=24, return_tensors="pt")).last_hidden_state.mean(1)
        for place in (2, 3):
            row = row @ load_file(source / f"{place}_Dense" / "model.safetensors")["linear.weight"].T
        rows.append(torch.nn.functional.normalize(row, dim=-1)[0])
    return torch.stack(rows)


def test_a_decoder_that_reads_both_ways_makes_vectors_through_the_layers_behind_it(tmp_path: Path) -> None:
    source = embedding_gemma(tmp_path / "made")
    assert read_facts(LoadSpec(source=str(source), task="feature-extraction")).task == "feature-extraction"
    out = loaded(source, tmp_path / "out", "feature-extraction")
    assert (opened_vectors(out) - gemma_vectors(source, TEXTS)).abs().max() < 1e-5


def test_masks_of_both_ways_are_those_that_transformers_makes(tmp_path: Path) -> None:
    """OpenVINO's graph is given them: windows in both directions, and padding that sees itself."""
    import torch
    from transformers import AutoModel

    from featherweight.runtimes.openvino.convert import both_ways

    model = AutoModel.from_pretrained(embedding_gemma(tmp_path / "made")).eval()
    ids = torch.randint(5, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask).last_hidden_state
        ours = model(input_ids=ids, attention_mask=both_ways(mask, model.config.sliding_window)).last_hidden_state
    assert (ours - theirs)[mask.bool()].abs().max() < 1e-5
    assert ours.isfinite().all()


@pytest.mark.engine
@pytest.mark.skipif(RUNTIMES["openvino"].missing() is not None, reason=str(RUNTIMES["openvino"].missing()))
def test_openvino_makes_vectors_of_decoders_with_what_lies_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_parity, "open_worker", InProcess)
    source = loaded(embedding_gemma(tmp_path / "made"), tmp_path / "out", "feature-extraction")
    write_documents(tmp_path / "text", [Document(str(place), one) for place, one in enumerate(TEXTS * 3)])
    _, metrics = exported(source, tmp_path / "text", tmp_path / "served", engine="openvino", precision="int8")
    assert metrics["parity_mean_abs"] < metrics["parity_bound"]
    assert metrics["parity_weights_max_abs"] < 1e-3


def test_layers_behind_the_pooling_stay_through_the_stages(tmp_path: Path) -> None:
    import torch

    from featherweight.quantization.spec import QuantizeSpec
    from tasks.quantize import quantize

    source = loaded(embedding_gemma(tmp_path / "made"), tmp_path / "loaded", "feature-extraction")
    write_documents(tmp_path / "text", [Document(str(place), one) for place, one in enumerate(TEXTS * 3)])
    (tmp_path / "rounded").mkdir()
    spec = QuantizeSpec.of(method="rtn", sequence=16, samples=8)
    quantize(spec, checkpoint=source, text=tmp_path / "text", calibration=tmp_path / "text", out=tmp_path / "rounded")
    ours, right = opened_vectors(tmp_path / "rounded"), opened_vectors(source)
    assert torch.nn.functional.cosine_similarity(ours, right).min() > 0.99


def test_a_request_names_the_prompt_before_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_engine, "open_worker", InProcess)
    source = embedding_gemma(tmp_path / "made")
    out = loaded(source, tmp_path / "out", "feature-extraction")
    Serving("torch").write(out)
    labeller = Labeller(out)
    right = gemma_vectors(source, [f"the old tree . {one}" for one in TEXTS]).numpy()
    assert abs(labeller(TEXTS, prompt_name="query") - right).max() < 1e-5
    assert abs(labeller(TEXTS) - gemma_vectors(source, TEXTS).numpy()).max() < 1e-5
    with pytest.raises(DataError, match="this model has no prompt 'passage'; it has query, document"):
        labeller(TEXTS, prompt_name="passage")


def test_files_of_a_cross_encoder_leave_the_head_that_it_has(tmp_path: Path) -> None:
    """sentence-transformers 6 puts modules.json beside those too."""
    source = made(tmp_path / "made", "number")
    (source / "modules.json").write_text(
        json.dumps([{"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}])
    )
    files = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"}
    (source / "config_sentence_transformers.json").write_text(json.dumps(files))
    assert read_facts(LoadSpec(source=str(source), task="text-classification")).task == "text-classification"
    out = loaded(source, tmp_path / "out", "text-classification")
    assert scored(load_config(out), [[0.0, -3.0]])["score"] == -3.0


def test_a_layer_behind_the_pooling_that_is_stored_as_a_pickle_is_refused(tmp_path: Path) -> None:
    source = embedding_gemma(tmp_path / "made")
    (source / "3_Dense" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"3_Dense has no model.safetensors, a pickle at most; save it anew by"):
        read_facts(LoadSpec(source=str(source), task="feature-extraction"))


@pytest.mark.parametrize("head", ["labels", "vectors"])
def test_a_llama_whose_heads_are_pruned_keeps_what_it_is_for(tmp_path: Path, head: str) -> None:
    """It is described as a Mistral then, whose class has the same head."""
    from featherweight.pruning.spec import PruneSpec
    from tasks.prune import prune

    task: Task = "text-classification" if head == "labels" else "feature-extraction"
    source = heads.head_checkpoint("llama", task, tmp_path / "made", num_key_value_heads=4, **HEADS["labels"][1])
    if head == "vectors":
        heads.sentence_files(source)
    loaded(source, tmp_path / "loaded", task)
    write_documents(tmp_path / "text", heads.labelled(40))
    (tmp_path / "out").mkdir()
    spec = PruneSpec.of(ratio=0.25, samples=8, sequence=16, finetune=None)
    prune(spec, checkpoint=tmp_path / "loaded", calibration=tmp_path / "text", out=tmp_path / "out")
    config = load_config(tmp_path / "out")
    assert (config.model_type, task_of(config)) == ("mistral", task)
    assert opened_vectors(tmp_path / "out").isfinite().all()


def test_a_narrower_hidden_state_is_refused_in_the_plan() -> None:
    from featherweight.model.parent import Parent
    from featherweight.pruning.spec import PruneSpec

    for task in HEADED:
        assert "prune heads, channels or layers" in str(PruneSpec.of(method="width").refusal(Parent(task, "qwen3")))
    assert PruneSpec.of(method="width").refusal(Parent("text-generation", "qwen3")) is None


@pytest.mark.parametrize("head", ["labels", "tags"])
def test_aotinductor_is_given_what_is_said_behind_every_token(tmp_path: Path, head: str) -> None:
    """As torch.export hands it over, at other lengths than the ones that it was traced with."""
    import torch

    from featherweight.model.heads import read_states
    from featherweight.runtimes.torch_aoti import graph

    source = made(tmp_path / "made", head)
    right, out = alone(source, HEADS[head][0], TEXTS), loaded(source, tmp_path / "out", HEADS[head][0])
    model, (ids, types) = load_model(out).eval(), tokens(out, TEXTS)
    inputs = packed_inputs(model.config, ids, types)
    with torch.no_grad():
        program = graph.programs(model, None)["read"].module()
        lengths = torch.tensor([len(row) for row in ids])
        found = program(inputs["input_ids"], torch.zeros_like(inputs["input_ids"]), lengths)
        rows = read_states(model.config, found, inputs)
    for ours, theirs in zip(rows, right, strict=True):
        assert torch.allclose(logits(ours[: len(theirs)].tolist(), head), theirs, atol=1e-5)


def test_the_tokens_of_a_prompt_are_kept_as_it_is_read(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from featherweight.model.heads import SentenceEmbedding
    from featherweight.pruning.used_tokens import used_in
    from tests.support import tokenizers

    tokenizer = tokenizers.byte_level()
    config = LlamaConfig(**SentenceEmbedding(lower_case=True, prompts={"query": "XQ"}).settings())
    write_documents(tmp_path / "text", [Document("0", "the tree")])
    found = used_in([tmp_path / "text"], tokenizer, config)
    assert {*tokenizer("xq")["input_ids"]} <= found and not {*tokenizer("XQ")["input_ids"]} <= found
