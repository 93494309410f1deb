"""The conformance matrix: whom it asks, what it makes, what it calls a defect; and a part of it, run."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest

from conformance import cell, run, vllm_client
from conformance.__main__ import _defects
from conformance.cell import FLOAT, INT8, LOAD, QUANTIZE, TOKENS, Folders
from conformance.families import families
from conformance.outcome import Matrix, Outcome
from conformance.page import page
from conformance.sizes import HEAD, WINDOW
from conformance.tiny import Case, cases, configuration, make
from featherweight.errors import CheckpointError, ParityError, RecipeError, ToolchainError
from featherweight.model.facts import CheckpointFacts
from featherweight.runtimes import parity
from featherweight.runtimes.candidate import Candidate
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.system.processes import end_group
from tests.support.tokenizers import byte_level

pytestmark = pytest.mark.slow

GATE = ("llama, rope llama3", "qwen2", "gpt2", "t5", "bert")
"""A scaled rotary embedding, a sliding window, Conv1D and no BOS, an encoder-decoder, an encoder."""
ENGINES = ("torch", "ctranslate2", "onnxruntime-genai", "torchao-int8")


@cache
def named_cases() -> dict[str, Case]:
    """Asked for by the tests alone: to ask transformers and every engine takes seconds."""
    return {case.name: case for case in cases()}


def case_of(name: str) -> Case:
    return named_cases()[name]


def test_the_families_are_those_that_transformers_and_the_engines_name() -> None:
    known = {one.model_type: one for one in families()}
    assert {"ctranslate2", "onnxruntime-genai"} <= set(known["llama"].engines)
    assert known["t5"].kind == "seq2seq" and known["bert"].kind == "encoder" and known["bloom"].kind == "causal"
    assert not {"whisper", "gemma3", "wav2vec2", "t5gemma2"} & known.keys()
    assert sum(not set(one.engines) <= {"vllm", "torch"} for one in known.values()) >= 40


def test_a_tiny_checkpoint_has_the_traits_of_its_row(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = make(case_of("mistral"), tmp_path / "mistral")
    config = AutoConfig.from_pretrained(folder)
    assert (config.sliding_window, config.num_hidden_layers, config.head_dim) == (WINDOW, 2, HEAD)
    assert len(GenerationConfig.from_pretrained(folder).eos_token_id) == 2
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids[0] == config.bos_token_id
    assert AutoTokenizer.from_pretrained(make(case_of("gpt2"), tmp_path / "gpt2"))("a").input_ids[0] != config.bos_token_id


def test_layers_of_several_shapes_are_refused_in_one_line(tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    cell.built(case_of("gemma4_text"), folders)
    with pytest.raises(
        CheckpointError, match=r"the layers of a gemma4_text model differ in .*head_dim.*, which is not taken here yet"
    ):
        cell.loaded(case_of("gemma4_text"), folders)


@pytest.mark.parametrize(
    ("name", "engine", "reason"),
    [
        ("llama, rope yarn", "onnxruntime-genai", r"cannot take this llama's rotary embeddings \(yarn\)"),
        ("llama, rope linear", "onnxruntime-genai", r"cannot take this llama's rotary embeddings \(linear\)"),
        ("gemma2", "ctranslate2", r"does not compute gemma2's soft caps of logits \(5\)"),
        ("mistral", "ctranslate2", "say max_tokens 48"),
        ("gemma3_text", "onnxruntime-genai", "takes one kind of rotary embeddings for all layers, and gemma3_text has several"),
        ("granitemoehybrid", "onnxruntime-genai", r"makes no layers of linear attention \(Mamba\)"),
        ("phi, norms of queries and keys", "onnxruntime-genai", "overlooks what phi does to queries and keys"),
        ("phi3, rope longrope", "ctranslate2", r"beyond 64 tokens \(longrope\).* say max_tokens 64"),
    ],
)
def test_what_an_engine_does_not_compute_is_refused_by_the_configuration_alone(name: str, engine: str, reason: str) -> None:
    config = configuration(case_of(name), byte_level())
    spec = RUNTIMES[engine].spec.model_validate({"engine": engine})
    assert re.search(reason, RUNTIMES[engine].model_refusal(spec, Candidate(CheckpointFacts(config), TOKENS)) or "")


def raising(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RecipeError("no"), Outcome("refused", "no", "at export")),
        (ParityError("off"), Outcome("refused", "off", "by the gate")),
        (ToolchainError("absent"), Outcome("not run", "absent")),
        (KeyError("rope_type"), Outcome("defect", "KeyError: 'rope_type'")),
    ],
)
def test_a_raw_error_is_a_defect_and_a_line_of_ours_is_none(error: Exception, outcome: Outcome) -> None:
    assert cell.found(lambda: raising(error)) == outcome


def ending(seconds: float) -> Outcome:
    time.sleep(seconds)
    os._exit(3)


def spinning() -> None:
    while True:
        pass


def test_a_cell_that_dies_or_hangs_is_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork = multiprocessing.get_context("fork")
    assert run.apart(fork, 20, tmp_path, ending, 0.0) == Outcome("defect", "its process died with exit code 3")
    assert run.apart(fork, 0.05, tmp_path, ending, 60.0) == Outcome("defect", "not done after 0 s", seconds=0.05 * run.WALL)
    monkeypatch.setattr(run, "WALL", 120)
    spent = Outcome("not run", "not done after 1 CPU seconds; --limit gives it more", "at its limit", seconds=1)
    assert run.apart(fork, 1, tmp_path, spinning) == spent


@pytest.mark.parametrize(
    ("outcome", "fails"),
    [
        (Outcome("exact"), False),
        (Outcome("not run", "no tiny model is made of it here"), False),
        (Outcome("not run", "not done after 1 CPU seconds", "at its limit", seconds=1), True),
        (Outcome("defect", "its process died with exit code 3"), True),
    ],
)
def test_a_defect_and_a_cell_that_was_not_done_end_with_1(outcome: Outcome, fails: bool, tmp_path: Path) -> None:
    case, matrix = next(iter(cases())), Matrix.open(tmp_path / "cells.json")
    matrix.put(case.name, LOAD, outcome, "")
    assert _defects(matrix, [case], [LOAD]) == fails


def test_what_was_found_is_kept_and_not_run_again_until_its_bytes_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    wanted = [LOAD, QUANTIZE, f"torch {FLOAT}", f"ctranslate2 {FLOAT}"]

    def answered(_: Any, folders: Folders, work: Any, *arguments: Any) -> Any:
        if work is cell.planned:
            return {f"torch {FLOAT}": None, f"ctranslate2 {FLOAT}": asdict(Outcome("refused", "no", "before work"))}
        column = arguments[3:]
        seen.append(" ".join(column) or arguments[0].__name__)
        return Outcome("defect", "wrong") if column else Outcome("exact", max_nats=0.0)

    monkeypatch.setattr(run.Run, "_answer", answered)
    for number in range(3):
        matrix = Matrix.open(tmp_path / "cells.json")
        if number == 2:
            (tmp_path / "work" / "llama" / "checkpoint").mkdir()
            (tmp_path / "work" / "llama" / "checkpoint" / "weights").write_bytes(b"others")
        run.Run(matrix, tmp_path / "work", 1.0).all([case_of("llama")], wanted)
    torch = f"torch {FLOAT}"
    assert seen == ["built", "loaded", "quantized", torch, "quantized", torch]
    assert matrix.get("llama", f"ctranslate2 {FLOAT}") == Outcome("refused", "no", "before work")


def test_a_server_is_forked_of_one_that_was_imported_and_ends_with_its_cell(tmp_path: Path) -> None:
    """By a stand-in for vLLM, whose import is what takes the time."""
    package = tmp_path / "vllm" / "entrypoints" / "launchers" / "api_server"
    package.mkdir(parents=True)
    (package / "entry.py").write_text("import sys, time\ndef main():\n    print(sys.argv[1:], flush=True)\n    time.sleep(60)\n")
    address, start = tmp_path / "socket", tmp_path / "start.py"
    start.write_text("def import_once():\n    pass\n")
    told = f"import sys; sys.argv = ['', {str(address)!r}, {str(start)!r}]; "
    told += "from conformance import vllm_fork as fork; fork.WARM = (); fork.main()"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{vllm_client.ROOT}"}
    with subprocess.Popen([sys.executable, "-c", told], stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            with pytest.MonkeyPatch.context() as patch, (tmp_path / "log").open("w+b") as log:
                patch.setenv(vllm_client.SOCKET, str(address))
                server = vllm_client.Server(["--port", "1"], dict(environment), log)
                assert server.poll() is None
                ends = time.monotonic() + 30
                while not (tmp_path / "log").read_bytes().endswith(b"\n") and time.monotonic() < ends:
                    time.sleep(0.02)
                end_group(cast(Any, server))
                assert server.poll() == -signal.SIGTERM
                assert (tmp_path / "log").read_bytes() == b"['--port', '1']\n"
        finally:
            process.kill()


def test_the_page_tells_each_defect(tmp_path: Path) -> None:
    matrix = Matrix(tmp_path / "cells.json")
    for column, outcome in ((LOAD, Outcome("exact")), (QUANTIZE, Outcome("exact")), (f"torch {FLOAT}", Outcome("defect", "wrong"))):
        matrix.put("llama", column, outcome, "")
    told = page(Matrix.open(tmp_path / "cells.json"), [case_of("llama"), case_of("t5")], [LOAD, QUANTIZE, f"torch {FLOAT}"])
    assert "| llama | = | = | **!** · |" in told and "| t5 |" not in told
    assert "- torch float32, all: wrong" in told
    assert re.search(r"## Rows not run \(1\)\n\n- which .*names?: t5\n", told)


ONCE_WRONG = (
    ("llama, rope llama3", "ctranslate2"),
    ("phi3, rope longrope, short texts", "ctranslate2"),
    ("phi", "ctranslate2"),
    ("falcon", "ctranslate2"),
    ("gpt_neox", "ctranslate2"),
    ("gptj", "ctranslate2"),
    ("falcon, new architecture, one norm", "ctranslate2"),
    ("olmo", "onnxruntime-genai"),
    ("phi", "onnxruntime-genai"),
    ("gemma2", "torch"),
    ("bloom", "torch"),
    ("mamba", "torch"),
    ("gemma", "onnxruntime-genai"),
    ("bart, stacks of two sizes", "ctranslate2"),
    ("falcon, alibi", "torch"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "engine"), ONCE_WRONG)
def test_what_was_once_wrong_or_refused_is_exact(name: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "open_worker", parity.open_worker)
    case, folders = case_of(name), Folders(tmp_path)
    for work in (cell.built, cell.loaded):
        assert work(case, folders).kind == "exact"
    assert cell.found(lambda: cell.served(case, folders, engine, FLOAT)).kind == "exact"


@pytest.mark.slow
@pytest.mark.parametrize("name", GATE)
def test_a_part_of_the_matrix(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is here is exact, within the bound, or refused in one line: the whole of it is `make conformance`."""
    monkeypatch.setattr(parity, "open_worker", parity.open_worker)  # which a cell replaces in its own process
    case, folders = case_of(name), Folders(tmp_path)
    first = [cell.found(lambda work=work: work(case, folders)) for work in (cell.built, cell.loaded, cell.quantized)]  # type: ignore[misc]
    assert [outcome.kind for outcome in first] == ["exact", "exact", "within bound"], first
    for engine in ENGINES:
        for form in (FLOAT, INT8):
            outcome = cell.found(lambda engine=engine, form=form: cell.served(case, folders, engine, form))  # type: ignore[misc]
            assert outcome.kind in ("exact", "within bound", "refused", "not offered"), (engine, form, outcome)
            assert engine != "torch" or form != FLOAT or outcome.kind == "exact"
