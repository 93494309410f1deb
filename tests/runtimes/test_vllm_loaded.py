"""vLLM's server, as far as it can be told without starting one."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from featherweight.model.facts import Values, describe
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.generation_settings import GenerationSettings
from featherweight.runtimes.interface import Limits
from featherweight.runtimes.vllm import server
from featherweight.runtimes.vllm.ends import STARTED_BY, write_ends
from featherweight.runtimes.vllm.loaded import said
from featherweight.runtimes.vllm.server import _cache_bytes
from featherweight.store.served_folder import Serving
from tests.support import serving_models, tokenizers

BLOCK, PAIR = 128, 2 * 4


@pytest.mark.parametrize(("kind", "heads", "width"), [("gpt2", 4, 2048), ("bloom", 4, 2048), ("llama", 2, 2048)])
def test_the_cache_has_room_for_the_batch_whatever_a_config_calls_its_heads(kind: str, heads: int, width: int) -> None:
    from transformers import AutoConfig

    sizes = {"gpt2": {"n_embd": heads * width, "n_head": heads}, "bloom": {"hidden_size": heads * width, "n_head": heads}}
    grouped = {"hidden_size": 4 * width, "num_attention_heads": 4, "num_key_value_heads": heads, "num_hidden_layers": 3}
    told = {"n_layer": 3} | sizes[kind] if kind in sizes else grouped
    config = Values(describe(AutoConfig.for_model(kind, **told)))
    assert _cache_bytes(config, Limits(1, 256, 8)) == 2 * (8 * 2 + 2) * BLOCK * PAIR * 3 * heads * width


PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0} | PENALTIES
SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | PENALTIES


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({}, GREEDY),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, GREEDY),
        ({"do_sample": True}, SAMPLED),
        ({"do_sample": True, "temperature": 0.6, "top_k": 0}, SAMPLED | {"temperature": 0.6, "top_k": 0}),
        ({"repetition_penalty": 1.3}, GREEDY | {"repetition_penalty": 1.3}),
        ({"presence_penalty": 1.5, "frequency_penalty": 0.5}, GREEDY),
    ],
)
def test_users_are_answered_greedily_where_transformers_would(
    asked: dict[str, Any], chosen: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own default is to sample, at the temperature of a file that asks for no sampling; it takes penalties of its own."""
    monkeypatch.setattr(server, "program", lambda: ["vllm"])
    folder = serving_models.make("llama", tmp_path / "served", tokenizers.byte_level())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], **asked}))
    Serving("vllm").write(folder)
    command = server.engine_server(folder, "model", Limits(1, 64, 4), tmp_path / "socket").command
    told = dict(pairwise(command))
    assert json.loads(told["--override-generation-config"]) == chosen
    assert told["--generation-config"] == "auto", "named by its path, its max_new_tokens cut what a request asked for"
    assert told["--model"] == str(folder)


@pytest.mark.parametrize("setting", [{"min_new_tokens": 5}, {"forced_eos_token_id": 2}, {"min_p": 0.1, "do_sample": True}])
def test_what_its_server_cannot_be_told_to_follow_is_refused(setting: dict[str, Any]) -> None:
    reason = GenerationSettings(setting).refusal(RUNTIMES["vllm"].loaded_model().follows, "vllm")
    assert reason and f"it does not follow {min(setting.keys() - {'do_sample'})}; take another engine" in reason


@pytest.mark.parametrize(
    ("ends", "clause"),
    [
        ([1, 2], None),
        (2, "ends a text at the tokenizer's eos_token too (id 1), which generation_config.json does not name"),
        ([1, 77], "leaves token 77 out of an answer, an end by generation_config.json that is no special token"),
    ],
)
def test_texts_that_it_would_end_otherwise_are_ended_by_a_start_of_ours(
    ends: object, clause: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that is not at hand, in an image of vLLM's, they would be other texts: such a champion is not deployed so."""
    monkeypatch.setattr(server, "python", lambda _: "python")
    folder = serving_models.make("llama", tmp_path / "served", tokenizers.byte_level())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    Serving("vllm").write(folder)
    made = server.engine_server(folder, "model", Limits(1, 64, 4), tmp_path / "socket")
    assert (made.here_alone is None) == (clause is None) and (clause or "") in (made.here_alone or "")
    assert made.command[:2] == ("python", "-m" if clause is None else str(STARTED_BY))


def test_it_is_told_the_ends_of_a_checkpoint_and_not_those_that_a_class_assumes(tmp_path: Path) -> None:
    """A LlamaConfig without an end has the token 2 for one, which vLLM's server takes where no generation_config.json says more."""
    folder = serving_models.make("llama", tmp_path / "checkpoint", tokenizers.byte_level())
    config = json.loads((folder / "config.json").read_text())
    config.pop("eos_token_id")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    (tmp_path / "out").mkdir()
    write_ends(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()).get("eos_token_id") is None


@pytest.mark.parametrize(("kind", "in_pytorch"), [("lfm2", True), ("lfm2_moe", True), ("llama", False)])
def test_heads_that_are_handed_apart_are_rotated_by_pytorch_on_cpus(
    kind: str, in_pytorch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's kernel for CPUs takes the rows of one token for those of several: LFM2's mixture was 0.97 nats off."""
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    for there, told in (((), in_pytorch), (("a GPU",), False)):
        monkeypatch.setattr(server, "gpus", lambda there=there: there)
        asked = server.arguments(tmp_path, tmp_path, {}, Limits(1, 128, 1))
        assert (asked[-2:] == ["--compilation-config", server.IN_PYTORCH]) is told


TRACEBACK = """(EngineCore pid=1) ERROR 11-28 [core.py:9] Traceback (most recent call last):
(EngineCore pid=1) ERROR 11-28 [core.py:9]   File "router.py", line 3, in route
{end}
(APIServer pid=2) RuntimeError: Engine core initialization failed. See root cause above.
INFO: 127.0.0.1:1 - "POST /v1/completions HTTP/1.1" 500 Internal Server Error
"""


@pytest.mark.parametrize(
    ("end", "root"),
    [
        ("(EngineCore pid=1) ERROR 11-28 [core.py:9] ValueError: Head dimension 40", "ValueError: Head dimension 40"),
        (
            "pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, no such key\n    For more, visit it",
            "pydantic_core.ValidationError: 1 validation error for ModelConfig Value error, no such key",
        ),
        (
            "(EngineCore pid=1) ERROR 11-28 [core.py:9]     assert scoring == 'softmax'\n"
            "(EngineCore pid=1) ERROR 11-28 [core.py:9]            ^^^^^^^^^^^^^^^^^^^^\n"
            "(EngineCore pid=1) ERROR 11-28 [core.py:9] AssertionError",
            "AssertionError: assert scoring == 'softmax'",
        ),
        ("    assert scoring == 'softmax'\nAssertionError", "AssertionError: assert scoring == 'softmax'"),
    ],
)
def test_what_a_server_said_is_its_root_error_and_of_a_bare_assertion_what_was_asserted(end: str, root: str) -> None:
    assert said(TRACEBACK.format(end=end)) == f"it said: {root}"


def test_the_root_error_of_a_server_is_found_in_its_log() -> None:
    log = (
        "(Engine pid=7) ERROR 11-21 02:33:14 [core.py:1512] RuntimeError: Unsupported head_dim=16\n"
        "WARNING [utils.py:2] could cause errors like `OSError: [Errno 24] Too many open files`\n"
        "torch.OutOfMemoryError: 3 GiB\n"
    )
    assert said(log) == "it said: torch.OutOfMemoryError: 3 GiB"
    assert said(log.rpartition("torch.")[0]) == "it said: RuntimeError: Unsupported head_dim=16"


@pytest.mark.parametrize(("cpu", "started"), [(True, "asked here, fork"), (False, "asked elsewhere, spawn")])
def test_a_server_on_a_cpu_starts_no_process_that_imports_vllm_anew(cpu: bool, started: str, tmp_path: Path) -> None:
    """By a stand-in for vLLM that tells how it would start them."""
    entry = "import multiprocessing\nfrom ....model_executor.models import registry\nfrom ....v1.engine import utils\n"
    entry += "def main():\n    ask = registry._run_in_subprocess(lambda: 'asked here')\n"
    entry += "    print(ask, utils.get_mp_context().get_start_method(), sep=', ')\n"
    spawning = "import multiprocessing\ndef get_mp_context():\n    return multiprocessing.get_context('spawn')\n"
    files = {
        "entrypoints/launchers/api_server/entry.py": entry,
        "platforms.py": f"class current_platform:\n    is_cpu = staticmethod(lambda: {cpu})\n",
        "model_executor/models/registry.py": "def _run_in_subprocess(ask):\n    return 'asked elsewhere'\n",
        "v1/engine/utils.py": spawning,
    }
    for name, text in files.items():
        (tmp_path / "vllm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "vllm" / name).write_text(text)
    command = [sys.executable, str(Path(server.__file__).with_name("start.py"))]
    told = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == started
