"""Runtimes: every engine gives the log-probabilities and the greedy text of the PyTorch model, in a process that behaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from featherweight.errors import IntegrityError, RecipeError, StageError, ToolchainError
from featherweight.runtimes import client
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.client import open_worker
from featherweight.runtimes.interface import by_length, windows_at_once
from featherweight.store.served_folder import Serving
from tests.support.waiting import all_end

PROMPTS = [[0, 33, 60, 61], [0, 44, 51, 70, 71], [0, 90, 91, 92]]
NEW = 20


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory) -> Path:
    """A model that writes its own end-of-text token, the fourth of its greedy text, and should not stop there."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("runtimes") / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5 if parameter.ndim == 2 else 1.0)
    model.save_pretrained(folder)
    for file in tiny_checkpoint.glob("tokenizer*"):
        shutil.copy(file, folder)
    end = greedy(model, PROMPTS[:1], NEW)[0][3]
    for name in ("config.json", "generation_config.json"):
        described = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(described | {"eos_token_id": end}))
    return folder


def greedy(model, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy text, the slow and plain way: the whole sequence anew for every token."""
    import torch

    texts = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        for text in texts:
            for _ in range(new_tokens):
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


@pytest.fixture(scope="module")
def reference(checkpoint):
    """What transformers itself computes: (log-probabilities of windows, greedy text of prompts)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()

    def score(windows: list[list[int]]) -> list[list[float]]:
        rows = []
        with torch.no_grad():
            for ids in windows:
                every = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                rows.append(every[range(len(ids) - 1), ids[1:]].tolist())
        return rows

    return score, lambda prompts, new_tokens: greedy(model, prompts, new_tokens)


def serve_torch(checkpoint: Path, folder: Path, engine: str = "torch") -> None:
    shutil.copytree(checkpoint, folder)
    Serving(engine).write(folder)


def serve_ctranslate2(checkpoint: Path, folder: Path) -> None:
    import ctranslate2

    ctranslate2.converters.TransformersConverter(str(checkpoint)).convert(str(folder / "model"))
    Serving("ctranslate2", "model", {"compute_type": "float32"}).write(folder)


def serve_onnx(checkpoint: Path, folder: Path) -> None:
    import onnxruntime_genai.models  # noqa: F401 - puts the builder's folder on the path
    from onnxruntime_genai.models import builder

    arguments = ("", str(checkpoint), str(folder / "model"), "fp32", "cpu", str(folder / "cache"))
    builder.create_model(*arguments, **builder.parse_extra_options(*arguments, ["hf_token=false"]))
    Serving("onnxruntime-genai", "model").write(folder)


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "torch": serve_torch,
    "torch-compile": lambda checkpoint, folder: serve_torch(checkpoint, folder, "torch-compile"),
    "ctranslate2": serve_ctranslate2,
    "onnxruntime-genai": serve_onnx,
}


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory) -> Callable[[str], Path]:
    """The checkpoint's served folder for an engine, made once."""
    made: dict[str, Path] = {}

    def make(engine: str) -> Path:
        if engine not in made:
            made[engine] = tmp_path_factory.mktemp("served") / engine
            MAKERS[engine](checkpoint, made[engine])
        return made[engine]

    return make


@pytest.mark.engine
@pytest.mark.parametrize("engine", list(MAKERS))
def test_an_engine_computes_what_pytorch_computes(engine, served, reference):
    if reason := RUNTIMES[engine].missing():
        pytest.skip(reason)
    score, write = reference
    vocabulary = json.loads((served("torch") / "config.json").read_text())["vocab_size"]
    last = vocabulary - 1
    windows = [*PROMPTS, [0, *range(5, 45)], [0, 30, last, last, last], [0, 31, 32, 33, 34], [0, last]]
    with open_worker(served(engine), threads=1, max_tokens=64, max_batch=4) as worker:
        flat = [value for row in worker.logprobs(windows) for value in row]
        assert flat == pytest.approx([value for row in score(windows) for value in row], abs=2e-4)
        expected = write(PROMPTS, NEW)
        assert worker.generate(PROMPTS, NEW) == expected
        end = json.loads((served("torch") / "config.json").read_text())["eos_token_id"]
        assert end in expected[0][:-1], "the end-of-text token must come up for this test to mean something"
        assert worker.generate(PROMPTS[:1], 1) == [expected[0][:1]]
        timing = worker.time(PROMPTS, NEW)
        assert 0 < timing.ttft_s < timing.total_s < 600
        if engine != "torch-compile":  # which would compile for a minute
            worker.set_threads(2)
            assert worker.generate(PROMPTS, NEW) == expected
        assert 2e7 < worker.peak_memory_bytes() < 2e9


@pytest.mark.engine
@pytest.mark.skipif(RUNTIMES["vllm"].missing() is not None, reason="the vLLM toolchain is not installed: run 'make setup'")
def test_vllm_computes_what_pytorch_computes_and_leaves_nothing_behind(tmp_path, tiny_checkpoint):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)  # vLLM's attention on CPUs knows no heads of 16
    config = LlamaConfig.from_pretrained(tiny_checkpoint, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    for file in tiny_checkpoint.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "checkpoint")
    serve_torch(tmp_path / "checkpoint", tmp_path / "served", "vllm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").eval()
    window = [0, *range(5, 68)]
    with open_worker(tmp_path / "served", threads=1, max_tokens=64, max_batch=4) as worker:
        processes = psutil.Process(worker._child.process.pid).children(recursive=True)
        with torch.no_grad():
            every = model(torch.tensor([window])).logits[0, :-1].log_softmax(-1)
        rows = worker.logprobs([window, window[:9]])
        assert rows[0] == pytest.approx(every[range(63), window[1:]].tolist(), abs=2e-4)
        assert rows[1] == pytest.approx(rows[0][:8], abs=2e-4)
        assert worker.generate(PROMPTS, NEW) == greedy(model, PROMPTS, NEW)
        timing = worker.time(PROMPTS, NEW)
        assert 0 < timing.ttft_s < timing.total_s
        assert worker.peak_memory_bytes() > 2e8
    assert processes and all_end(*processes)


# The process


@pytest.mark.engine
def test_a_worker_has_its_threads_before_its_libraries_and_a_memory_of_its_own(served):
    ballast = bytearray(os.urandom(1 << 20)) * 400
    with open_worker(served("ctranslate2"), threads=3, max_tokens=64) as worker:
        environment = psutil.Process(worker._child.process.pid).environ()
        assert {environment[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} == {"3"}
        assert worker.peak_memory_bytes() < len(ballast)
        assert worker.startup_s > 0


@pytest.mark.engine
def test_a_worker_refuses_what_it_was_not_opened_for_and_goes_on(served):
    with open_worker(served("ctranslate2"), threads=1, max_tokens=16, max_batch=2) as worker:
        for wrong in ([[0] * 17], [[0]]):
            with pytest.raises(StageError, match="2 to 16 tokens"):
                worker.logprobs(wrong)
        with pytest.raises(StageError, match="2 sequences of 16 tokens, not for 1 of 20"):
            worker.generate([[0] * 4], 16)
        with pytest.raises(StageError, match="not for 3 of"):
            worker.generate([[0]] * 3, 4)
        with pytest.raises(StageError, match="ctranslate2 failed while scoring: "):
            worker.logprobs([[0, 10**6]])
        assert len(worker.generate([[0]], 4)[0]) == 4


@pytest.mark.engine
def test_a_worker_that_dies_says_so(served):
    with open_worker(served("ctranslate2"), threads=1, max_tokens=64) as worker:
        os.kill(worker._child.process.pid, signal.SIGKILL)
        with pytest.raises(StageError, match=r"ctranslate2 died while generating \(signal 9\)"):
            worker.generate(PROMPTS, 4)


@pytest.mark.engine
def test_a_worker_that_hangs_is_ended_with_a_clear_error(served, monkeypatch):
    monkeypatch.setattr(client, "CALL_TIMEOUT_S", 0.5)
    with open_worker(served("ctranslate2"), threads=1, max_tokens=64) as worker:
        os.kill(worker._child.process.pid, signal.SIGSTOP)
        with pytest.raises(StageError, match="hung while scoring: no answer in"):
            worker.logprobs(PROMPTS)
        assert worker._child.process.returncode == -signal.SIGKILL


@pytest.mark.engine
def test_an_engine_that_cannot_load_is_one_clear_line(tmp_path):
    Serving("ctranslate2", "model").write(tmp_path)
    with pytest.raises(StageError, match=r"^ctranslate2 failed while starting: FileNotFoundError: .*vocabulary\.json") as caught:
        open_worker(tmp_path, threads=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(IntegrityError, match=r"no serving\.json"):
        open_worker(tmp_path / "nowhere", threads=1)


@pytest.mark.engine
def test_nothing_survives_a_killed_parent(served):
    code = (
        "import sys, time; from pathlib import Path; from featherweight.runtimes.client import open_worker\n"
        "worker = open_worker(Path(sys.argv[1]), 1, 64); print(worker._child.process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(served("ctranslate2"))], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert all_end(worker)


@pytest.mark.slow
def test_workers_import_no_library_of_another_engine():
    code = (
        "import sys; from featherweight.runtimes import worker\n"
        "from featherweight.runtimes.catalog import RUNTIMES\n"
        "[RUNTIMES[name].loaded_model() for name in RUNTIMES]\n"
        "print({'torch', 'transformers', 'ctranslate2', 'onnxruntime_genai', 'httpx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# The table of engines


def test_unknown_engines_are_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match="unknown engine 'tensorrt'; known: ctranslate2, "):
        RUNTIMES["tensorrt"].missing()


def test_missing_engines_say_why_and_what_to_do(tmp_path, monkeypatch):
    on_demand = ("vllm", "torch-compile", "llama.cpp", "openvino", "tvm")
    assert {RUNTIMES[name].missing() for name in RUNTIMES if name not in on_demand} == {None}
    monkeypatch.setenv("FEATHERWEIGHT_TOOLCHAINS", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "make setup" in str(RUNTIMES["vllm"].missing())
    assert "no-such-compiler" in str(RUNTIMES["torch-compile"].missing())
    Serving("vllm").write(tmp_path)
    with pytest.raises(ToolchainError, match=r"vllm cannot run here: .*make setup"):
        open_worker(tmp_path, threads=1)


def test_batches_hold_sequences_of_one_length():
    batches = list(by_length([[1], [1, 2], [3], [4], [5, 6]], most=2))
    assert batches == [[0, 2], [3], [1, 4]]
    assert windows_at_once(256, 32000) == 4 and windows_at_once(2048, 128_000) == 1
