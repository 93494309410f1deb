"""What another Python said of a checkpoint is kept, for as long as it would say the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from featherweight.checkpoint import description
from featherweight.errors import CheckpointError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The commands that were started, from a process without torch and a cache that is empty."""
    commands: list[Any] = []

    def run(command: Any, **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        told = "Some library speaks first.\n" + '{"config": {"names": {}, "values": {}}, "generation": {}}'
        return subprocess.CompletedProcess(command, 0, told if "broken" not in command[-1] else "", "ValueError: no such rope")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delitem(description.sys.modules, "torch", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return commands


def test_it_is_asked_once_until_a_file_changes(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    answers = [description.described(tmp_path) for _ in range(3)]
    assert (len(asked), answers[0]) == (1, answers[2])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    description.described(tmp_path)
    assert len(asked) == 2
    kept = list((tmp_path / "cache").rglob("*.json"))
    kept[0].write_text("{half")
    kept[1].write_text("{half")
    assert description.described(tmp_path) == answers[0]
    assert len(asked) == 3


def test_a_refusal_is_not_kept(asked: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="describes no model that transformers can build: ValueError: no such rope"):
            description.described(folder)
    assert len(asked) == 2


def test_rotary_embeddings_that_transformers_cannot_make_are_told_with_the_description(tmp_path: Path) -> None:
    told = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 40}
    errors = []
    for kind in ("fancy", "linear"):
        rotary = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
        (tmp_path / "config.json").write_text(json.dumps(told | {"rope_parameters": rotary}))
        errors.append(description.read(tmp_path, None).get("error"))
    assert errors == ["it knows no rotary embeddings of the kind 'fancy' (rope_type)", None]


def test_layers_that_differ_by_the_configuration_are_refused_with_the_description(tmp_path: Path) -> None:
    told = {"model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"], "num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(told))
    answer = description.read(tmp_path, None)
    assert answer["refused"] and "the layers of a gemma4_text model differ in head_dim" in answer["error"]


def test_settings_that_transformers_refuses_are_told_by_their_own_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"num_return_sequences": 2}))
    assert "such as those of generation_config.json: Greedy methods" in description.read(tmp_path, None)["error"]


ASKED = """
import json, sys
from pathlib import Path
sys.modules["torch"] = None
from featherweight.checkpoint.description import read
print(json.dumps([read(Path(folder), None).get("error") for folder in sys.argv[1:]]))
"""


@pytest.mark.parametrize("told", [{}, {"decoder_start_token_id": [2, 3]}])
def test_a_translator_whose_texts_have_no_beginning_is_refused(told: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}))
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="so that transformers' generate fails; put decoder_start_token_id into"):
        description.described(tmp_path)


def test_without_torch_every_kind_of_model_is_described(tmp_path: Path) -> None:
    told = {
        "unnamed": {"model_type": "gemma2"},
        "causal": {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
        "encoder": {"model_type": "bert", "architectures": ["BertForMaskedLM"], "is_decoder": False},
        "both": {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "decoder_start_token_id": 2},
        "refused": {"model_type": "xlnet", "architectures": ["XLNetLMHeadModel"]},
    }
    for name, config in told.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    for order in (list(told), list(reversed(told))):
        command = [sys.executable, "-c", ASKED, *(str(tmp_path / name) for name in order)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        errors = dict(zip(order, json.loads(answer.stdout.splitlines()[-1]), strict=True))
        assert [name for name, error in errors.items() if error] == ["refused"]
        assert "reads the texts that follow" in errors["refused"]
