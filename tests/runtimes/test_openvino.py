"""OpenVINO: what is refused before anything is written, what it is told, and that what it serves answers as PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForMaskedLM

from featherweight.grid import GRIDS
from featherweight.model.facts import CheckpointFacts
from featherweight.runtimes import doctor, parity
from featherweight.runtimes.bounds import EXACT, INT8_ACTIVATIONS
from featherweight.runtimes.bytes_read import HeldTensor
from featherweight.runtimes.candidate import Candidate
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Grids
from featherweight.runtimes.openvino import convert
from featherweight.runtimes.openvino.bytes_read import graph_tensors
from featherweight.runtimes.openvino.loaded import properties
from featherweight.runtimes.openvino.write import _attention
from featherweight.store.served_folder import Serving
from featherweight.system.machine import describe
from tests.support.in_process import InProcess
from tests.support.serving_models import serving_spec

OPENVINO = RUNTIMES["openvino"]
ABSENT = OPENVINO.missing()


def spec(**keys: Any) -> Any:
    return serving_spec(engine="openvino", **keys)


@pytest.mark.parametrize(
    ("precision", "body", "reason"),
    [
        ("float32", None, None),
        ("float32", "int8", "would store rounded weights at full size"),
        ("int8", None, None),
        ("int8", "int8-g32", None),
        ("int4", "int4-g128", None),
        ("int4", "int8", "8-bit grid, and precision int4 would round them again"),
        ("int8", "fp8", "holds integers, not fp8"),
    ],
)
def test_grids_are_held_as_they_are_or_refused(precision: str, body: str | None, reason: str | None) -> None:
    found = OPENVINO.grid_refusal(Grids(GRIDS[body] if body else None), spec(precision=precision))
    assert (found is None) if reason is None else reason in str(found)


def test_encoder_decoders_and_what_a_trace_freezes_are_refused() -> None:
    assert "take another engine" in str(OPENVINO.task_refusal("text2text-generation"))
    assert OPENVINO.task_refusal("feature-extraction") is None
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = AutoConfig.for_model("llama", rope_parameters=dynamic)
    assert "are others for longer texts" in str(OPENVINO.model_refusal(spec(), Candidate(CheckpointFacts(config), 64)))


def test_weights_that_no_text_is_answered_with_are_told_from_those_that_are() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    entities = {"entity_vocab_size": 4, "entity_emb_size": 8}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("luke", **sizes, **entities)).eval()
    attention = "luke.encoder.layer.0.attention.self"
    names = [f"{attention}.{name}.weight" for name in ("query", "e2e_query", "w2e_query")]
    assert convert.idle(model, names) == set(names[1:]) and not convert.idle(model, [])


def test_texts_alone_are_batched_as_they_come() -> None:
    for kind, refused in (("bert", True), ("llama", False)):
        config = AutoConfig.for_model(kind)
        found = OPENVINO.model_refusal(spec(batching="continuous"), Candidate(CheckpointFacts(config), 64))
        assert ("an encoder answers at once" in str(found)) if refused else found is None


def test_soft_caps_are_traced_as_they_are_written_out_and_paged_by_nothing() -> None:
    """PyTorch's fused attention, which GenAI pages, leaves them out without a word: Gemma 2 was 1.0 nats off."""
    for kind, told in (("llama", []), ("gemma2", ["--attention=eager"])):
        config = AutoConfig.for_model(kind)
        assert _attention(config) == told
        found = OPENVINO.model_refusal(spec(batching="continuous"), Candidate(CheckpointFacts(config), 64))
        assert ("the soft cap of a gemma2" in str(found)) if told else found is None
        assert OPENVINO.model_refusal(spec(), Candidate(CheckpointFacts(config), 64)) is None


def test_rows_that_groups_do_not_divide_are_refused_by_name() -> None:
    config = AutoConfig.for_model("llama")
    for columns, refused in ((288, True), (256, False)):
        candidate = Candidate(CheckpointFacts(config), 64, {"layers.0.up": (GRIDS["int4-g128"], columns)})
        found = OPENVINO.model_refusal(spec(precision="int4"), candidate)
        assert ("leaves a shorter one of layers.0.up's 288 columns" in str(found)) if refused else found is None


def test_nothing_is_rounded_that_the_recipe_does_not_say() -> None:
    told = properties({}, 2)
    assert (told["INFERENCE_PRECISION_HINT"], told["KV_CACHE_PRECISION"], told["INFERENCE_NUM_THREADS"]) == ("f32", "f32", 2)
    assert (told["DYNAMIC_QUANTIZATION_GROUP_SIZE"], told["ENABLE_CPU_PINNING"]) == ("0", False)
    rounded = properties({"activations": "int8"}, 1)
    assert (rounded["DYNAMIC_QUANTIZATION_GROUP_SIZE"], rounded["KV_CACHE_PRECISION"]) == ("32", "f32")
    assert OPENVINO.bound(Serving("openvino", options={"activations": "float"}, grid="int8")) == EXACT
    assert OPENVINO.bound(Serving("openvino", options={"activations": "int8"}, grid="int8")) == INT8_ACTIVATIONS


def test_without_its_toolchain_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_TOOLCHAINS", str(tmp_path))
    assert "run `featherweight doctor --install openvino`" in str(OPENVINO.missing())
    checks = {check.name: check for check in [*doctor._engines(describe()), *doctor._toolchains()]}
    assert checks["engine openvino"].state == "missing"
    assert checks["toolchain openvino"].remedy == "run `featherweight doctor --install openvino`"


GRAPH = """<net><layers>
<layer id="0" type="Const"><data element_type="i4" shape="10, 2, 32" /></layer>
<layer id="1" type="Convert" /><layer id="2" type="Const"><data element_type="f32" shape="10, 2, 1" /></layer>
<layer id="3" type="Multiply" /><layer id="4" type="Gather" /><layer id="5" type="MatMul" />
<layer id="6" type="Const"><data element_type="f32" shape="7, 4" /></layer><layer id="7" type="Gather" />
<layer id="8" type="Const"><data element_type="i64" shape="2" /></layer>
</layers><edges>
<edge from-layer="0" to-layer="1" /><edge from-layer="1" to-layer="3" /><edge from-layer="2" to-layer="3" />
<edge from-layer="3" to-layer="4" /><edge from-layer="3" to-layer="5" /><edge from-layer="6" to-layer="7" />
</edges></net>"""


def test_a_tied_embedding_is_read_whole_and_a_table_by_rows(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_text(GRAPH)
    assert list(graph_tensors(tmp_path / "model.xml")) == [
        HeldTensor("step", 320.0, 10),
        HeldTensor("step", 80.0, 10),
        HeldTensor("row", 112.0, 7),
    ]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("llama", {"batching": "continuous"}),
        ("llama", {"precision": "int4", "activations": "float"}),
        ("gpt2", {"precision": "int8"}),
        ("bert", {"precision": "int8", "activations": "float"}),
    ],
)
def test_what_it_serves_answers_as_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, keys: dict[str, Any]
) -> None:
    from tasks.compile import compile
    from tests.support.families import family_checkpoint, write_pairs

    monkeypatch.setattr(parity, "open_worker", InProcess)
    sizes = {"hidden_size": 64, "intermediate_size": 96} if model_type == "llama" else {}
    checkpoint, out = family_checkpoint(model_type, tmp_path / "checkpoint", **sizes), tmp_path / "out"
    out.mkdir()
    metrics = compile(spec(max_tokens=48, **keys), checkpoint=checkpoint, calibration=write_pairs(tmp_path / "text"), out=out)
    assert metrics.get("parity_weights_max_abs", metrics["parity_max_abs"]) < 1e-4
    assert Serving.read(out).options.get("batching", "static") == keys.get("batching", "static")
    assert sum(tensor.size_bytes for tensor in OPENVINO.held_tensors(out / "openvino", Serving.read(out), None)) > 0
