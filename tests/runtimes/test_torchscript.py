"""TorchScript: what is refused before anything is traced, and that what it traces answers as PyTorch whatever it was traced by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.errors import IntegrityError, StageError
from featherweight.grid import GRIDS
from featherweight.model.facts import CheckpointFacts
from featherweight.runtimes.candidate import Candidate
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Grids, Limits
from featherweight.runtimes.torchscript import graph, loaded
from featherweight.store.served_folder import Serving
from featherweight.system.machine import describe
from tests.support.compiling import LABELS, check_labels, check_texts, compiled, configuration
from tests.support.families import family_checkpoint, write_words
from tests.support.serving_models import serving_spec

ENGINE = RUNTIMES["torchscript"]
SPEC, INT8 = serving_spec(engine="torchscript"), serving_spec(engine="torchscript", precision="int8")


@pytest.mark.parametrize(
    ("spec", "told", "reason"),
    [
        (SPEC, {"model_type": "llama"}, None),
        (INT8, {"model_type": "llama"}, None),
        (SPEC, {"model_type": "mamba2"}, "a mamba2 model keeps no keys and values"),
        (SPEC, {"model_type": "bamba", "layer_types": ["linear_attention", "full_attention"]}, "has layers of linear_attention"),
        (SPEC, {"model_type": "bloom"}, "a bloom's is part of transformers' module; take another engine"),
        (SPEC, {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}}, "depend on the length (dynamic)"),
        (INT8, {"model_type": "squeezebert"}, "the blocks of a squeezebert model have layers of their own"),
        (SPEC, {"model_type": "squeezebert"}, None),
        (SPEC, {"model_type": "longformer"}, "cannot trace a longformer model: its Python decides by the text"),
        (SPEC, {"model_type": "yoso"}, "cannot trace a yoso model: it has operations that no trace holds; take another engine"),
    ],
)
def test_models_that_no_trace_holds_are_refused(spec: Any, told: dict[str, Any], reason: str | None) -> None:
    found = ENGINE.model_refusal(spec, Candidate(CheckpointFacts(configuration(**told)), 64))
    assert (found is None) if reason is None else reason in str(found)


def test_it_serves_floats_and_rows_of_8_bits_of_decoders_and_encoders() -> None:
    assert ENGINE.grid_refusal(Grids(), SPEC) is None and ENGINE.grid_refusal(Grids(GRIDS["int8"]), INT8) is None
    assert "would store rounded weights at full size" in str(ENGINE.grid_refusal(Grids(GRIDS["int8"]), SPEC))
    assert "one scale per row of 8-bit weights, not int8-g32" in str(ENGINE.grid_refusal(Grids(GRIDS["int8-g32"]), INT8))
    assert "not of both in one" in str(ENGINE.task_refusal("text2text-generation"))
    assert ENGINE.task_refusal("text-generation") is None and ENGINE.task_refusal("token-classification") is None
    assert "serves from the CPU alone" in str(ENGINE.device_refusal(SPEC, "cuda", describe()))


class Choosing(torch.nn.Module):
    """As a model whose Python looks at its text: a trace keeps what it decided for one."""

    def __init__(self, chooses: str) -> None:
        super().__init__()
        self.chooses = chooses

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        if self.chooses == "by length":
            return ids * ids.tolist()[0][-1]
        if self.chooses == "by token":
            return ids + 1 if int(ids.max()) > 50 else ids - 1
        return ids * ids.shape[1]


@pytest.mark.parametrize(("chooses", "same"), [("nothing", True), ("by length", False), ("by token", False)])
def test_a_graph_of_one_text_alone_is_not_taken(chooses: str, same: bool) -> None:
    first, other = (graph._trace(Choosing(chooses), {"read": (ids,)}) for ids in (torch.full((2, 3), 7), torch.full((3, 5), 60)))
    if same:
        graph._require_same("read", graph._told(first, "read"), graph._told(other, "read"))
        return
    with pytest.raises(StageError, match="the read graph is another for another text"):
        graph._require_same("read", graph._told(first, "read"), graph._told(other, "read"))


def test_another_file_than_was_written_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"something that runs")
    (tmp_path / "manifest.json").write_text(json.dumps({"sha256": "0" * 64, "saturates": True}))
    with pytest.raises(IntegrityError, match=r"model\.pt is not the file that was written; compile the variant again"):
        loaded.TorchScriptModel(tmp_path, Serving("torchscript"), Limits(1))


def test_products_that_saturate_here_are_not_given_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from featherweight.runtimes.torch import linear

    monkeypatch.setattr(linear, "saturates", lambda: True)
    loaded._require_products(True)
    with pytest.raises(StageError, match="saturate on a CPU without VNNI; optimize the model on this machine"):
        loaded._require_products(False)


@pytest.mark.engine
def test_a_decoder_writes_as_pytorch_across_the_parts_of_its_cache(tmp_path: Path) -> None:
    """Grouped heads, prompts of two lengths in one call, and texts that cross 64 places; its weights lie in the file once."""
    checkpoint, engine = compiled(serving_spec(engine="torchscript", max_tokens=96), "llama", tmp_path)
    assert {path.name for path in (tmp_path / "out" / "torchscript").iterdir()} == {"model.pt", "manifest.json"}
    check_texts(checkpoint, engine, [[9, 8, 7] * 20, [12, 5, 9] * 20, [4, 5], [6]])


@pytest.mark.engine
def test_an_encoder_answers_each_text_as_if_it_were_alone(tmp_path: Path) -> None:
    check_labels(*compiled(serving_spec(engine="torchscript", max_tokens=96), "bert", tmp_path, **LABELS))


@pytest.mark.engine
def test_rounded_weights_answer_as_torch_dynamic_does(tmp_path: Path) -> None:
    """The same integers, in the same layers: what is left is the order of additions before a rounding."""
    from tasks.compile import compile
    from tasks.export import export

    checkpoint, text = family_checkpoint("llama", tmp_path / "checkpoint"), write_words(tmp_path / "text")
    engines = []
    for make, spec in ((compile, serving_spec(engine="torchscript", precision="int8", max_tokens=96)),
                       (export, serving_spec(engine="torch-dynamic", max_tokens=96))):  # fmt: skip
        out = tmp_path / spec.engine
        out.mkdir()
        make(spec, checkpoint=checkpoint, calibration=text, out=out)
        engines.append(RUNTIMES[spec.engine].loaded_model()(out, Serving.read(out), Limits(1, 96, 4)))
    windows = [[9, 8, 7] * 20, [12, 5, 9] * 20, [4, 5]]
    ours, theirs = (torch.tensor([score for row in engine.logprobs(windows) for score in row]) for engine in engines)
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)
    read = sum(one.size_bytes for one in ENGINE.held_tensors(tmp_path / "torchscript" / "torchscript", None, None))  # type: ignore[arg-type]
    assert read < 0.5 * (checkpoint / "model.safetensors").stat().st_size
