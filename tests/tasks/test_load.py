"""load: every kind of source ends as the same checked folder, or in one line and an empty folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest

from featherweight.checkpoint.arrivals import look
from featherweight.checkpoint.facts import facts_for_any_task, read_facts
from featherweight.checkpoint.fetching import look_at, source_fingerprint
from featherweight.checkpoint.files import INDEX, PICKLE, PICKLE_INDEX, WEIGHTS, Listing
from featherweight.checkpoint.identity import content_identity
from featherweight.checkpoint.inspection import inspect_checkpoint
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import CheckpointError, FeatherweightError, ServiceError
from featherweight.progress import Progress
from featherweight.store.served_folder import Serving
from tasks.load import load
from tests.conftest import S3Server
from tests.support.families import family_checkpoint
from tests.support.gguf_files import write_gguf
from tests.support.stores import empty_store
from tests.support.tokenizers import byte_level

PROMPT = "Once upon a time"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, with files that nobody needs."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (copy / "training_args.bin").write_bytes(b"a pickle")
    (copy / "modeling_other.py").write_text("raise SystemExit")
    (copy / "README.md").write_text("about it")
    return copy


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def spec(source: object, **options: object) -> LoadSpec:
    return LoadSpec.model_validate({"source": str(source), **options})


def refusal(source: object, out: Path, kind: type[FeatherweightError] = CheckpointError, **options: object) -> str:
    """The line with which a source is refused; nothing stays behind."""
    with pytest.raises(kind) as error:
        load(spec(source, **options), out=out)
    assert "\n" not in str(error.value)
    assert list(out.iterdir()) == []
    return str(error.value)


def logits(folder: Path) -> Any:
    """What the model says after the prompt, float32 [tokens, vocabulary]."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(**tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)).logits[0]


def same(left: Path, right: Path) -> bool:
    import torch

    return torch.equal(logits(left), logits(right))


def shard(folder: Path) -> list[Path]:
    """Turn the checkpoint into shards."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    return sorted(folder.glob("model-*.safetensors"))


TAKEN = {"config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_folder_is_copied_and_only_what_is_needed(folder: Path, out: Path):
    metrics = load(spec(folder), out=out)
    info = inspect_checkpoint(folder)
    assert metrics == {
        "parameters": info.parameters,
        "size_bytes": info.size_bytes,
        "vocab": info.vocab,
        "layers": 2,
        "context": 256,
    }
    assert names(out) == TAKEN
    assert not any((out / name).samefile(folder / name) for name in TAKEN), "what is written into one would reach the other"


@pytest.mark.parametrize(
    "kinds", [["MistralForCausalLM"], ["Qwen2ForCausalLM"], ["GPT2LMHeadModel"], ["LlamaModel", "LlamaForCausalLM"], ["LLaMA"]]
)
def test_a_decoder_is_what_its_model_type_says_whatever_else_is_named(kinds: list[str], folder: Path, out: Path) -> None:
    """As AutoModelForCausalLM opens it; engines go by the name that is written."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": kinds}))
    assert read_facts(spec(folder)).config.architectures == ["LlamaForCausalLM"]
    load(spec(folder), out=out)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert same(folder, out)


def test_the_decoder_alone_of_an_encoder_decoder_is_refused_in_the_plan(tmp_path: Path, out: Path) -> None:
    """It ended in "BartDecoderWrapper has no attribute `encoder`" once its weights were copied."""
    source = family_checkpoint("bart", tmp_path / "bart")
    config = json.loads((source / "config.json").read_text())
    alone = {"architectures": ["BartForCausalLM"], "is_encoder_decoder": False, "is_decoder": True}
    (source / "config.json").write_text(json.dumps(config | alone))
    reason = r"the decoder of an encoder-decoder alone \(BartForCausalLM\), which is not taken; give the whole model"
    with pytest.raises(CheckpointError, match=reason):
        read_facts(spec(source))
    assert re.search(reason, refusal(source, out))


def test_symbolic_links_are_followed(folder: Path, out: Path):
    blob = folder.parent / "blob"
    (folder / WEIGHTS).rename(blob)
    (folder / WEIGHTS).symlink_to(blob)
    load(spec(folder), out=out)
    assert not (out / WEIGHTS).is_symlink()
    assert (out / WEIGHTS).read_bytes() == blob.read_bytes()


def test_shards_stay_shards(folder: Path, out: Path):
    shards = shard(folder)
    load(spec(folder), out=out)
    assert names(out) == (TAKEN - {WEIGHTS}) | {INDEX, *(path.name for path in shards)}
    assert same(out, folder)


def test_a_refused_folder_leaves_nothing(folder: Path, out: Path):
    os.truncate(folder / WEIGHTS, 1000)
    assert f"{folder}/{WEIGHTS} is truncated: 1000 of at least" in refusal(folder, out)
    assert "does not exist" in refusal(folder / "none", out)
    assert "is a file" in refusal(folder / "README.md", out)


# --- pickles


def pickled(folder: Path, shards: bool) -> None:
    """Turn the checkpoint into pickles as old transformers wrote them: the tied head beside the embedding, sharing memory."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (folder / WEIGHTS).unlink()
    if not shards:
        torch.save(tensors, folder / PICKLE)
        return
    parts: dict[str, dict[str, Any]] = {"pytorch_model-00001-of-00002.bin": {}, "pytorch_model-00002-of-00002.bin": {}}
    for name, tensor in tensors.items():
        parts[f"pytorch_model-0000{1 if 'layers.0' in name else 2}-of-00002.bin"][name] = tensor
    for file, content in parts.items():
        torch.save(content, folder / file)
    mapping = {name: file for file, content in parts.items() for name in content}
    (folder / PICKLE_INDEX).write_text(json.dumps({"weight_map": mapping}))


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True])
def test_a_pickle_is_converted_only_where_the_recipe_says_so(folder: Path, out: Path, tiny_checkpoint: Path, shards: bool):
    pickled(folder, shards)
    assert "checkpoint.allow_pickle: true" in refusal(folder, out)
    load(spec(folder, allow_pickle=True), out=out)
    assert not any(name.endswith(".bin") for name in names(out))
    assert (INDEX in names(out)) == shards
    assert inspect_checkpoint(out).parameters == inspect_checkpoint(tiny_checkpoint).parameters
    assert same(out, tiny_checkpoint)
    stored = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert stored < (tiny_checkpoint / WEIGHTS).stat().st_size * 1.05, "the tied head was stored twice"


def test_a_pickle_beside_safetensors_is_left_alone(folder: Path, out: Path):
    (folder / PICKLE).write_bytes(b"whatever")
    load(spec(folder), out=out)
    assert names(out) == TAKEN


# --- GGUF


@pytest.mark.slow
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_gguf_file_becomes_safetensors_with_its_tokenizer(tmp_path: Path, out: Path, tiny_checkpoint: Path, as_folder: bool):
    import torch
    from transformers import AutoTokenizer

    (tmp_path / "gguf").mkdir()
    file = tmp_path / "gguf" / "tiny.gguf"
    write_gguf(file, tiny_checkpoint)
    load(spec(file.parent if as_folder else file), out=out)
    theirs, ours = (AutoTokenizer.from_pretrained(path) for path in (tiny_checkpoint, out))
    assert ours(PROMPT)["input_ids"] == theirs(PROMPT)["input_ids"]
    assert (ours.bos_token_id, ours.eos_token_id) == (0, 1)
    torch.testing.assert_close(logits(out), logits(tiny_checkpoint), rtol=1e-5, atol=1e-5)
    info, before = inspect_checkpoint(out), inspect_checkpoint(tiny_checkpoint)
    assert (info.parameters, info.tied, info.context) == (before.parameters, True, 256)


def test_a_gguf_file_that_is_none_or_damaged_is_refused(tmp_path: Path, out: Path, tiny_checkpoint: Path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_checkpoint)
    os.truncate(file, file.stat().st_size // 2)
    assert f"{file} is truncated: " in refusal(file, out)
    file.write_bytes(b"<html>")
    assert "not a GGUF file" in refusal(file, out)
    write_gguf(file, tiny_checkpoint, tokenizer=False)
    assert str(file) in refusal(file, out)
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    assert "2 GGUF files" in refusal(tmp_path, out)


# --- S3


def upload(server: S3Server, folder: Path, prefix: str = "models/tiny") -> str:
    client = boto3.client("s3")
    for path in folder.iterdir():
        client.upload_file(str(path), server.bucket, f"{prefix}/{path.name}")
    return f"s3://{server.bucket}/{prefix}"


def test_an_s3_prefix_is_downloaded(s3_server: S3Server, folder: Path, out: Path):
    shard(folder)
    uri = upload(s3_server, folder)
    steps: list[tuple[int, int]] = []
    listener = Progress()
    listener.step = lambda done, total, **_: steps.append((done, total))  # type: ignore[method-assign]
    load(spec(uri), out=out, progress=listener)
    assert names(out) == {name for name in names(folder) if name not in ("README.md", "training_args.bin", "modeling_other.py")}
    assert same(out, folder)
    taken = sum((folder / name).stat().st_size for name in names(out))
    assert steps[-1] == (taken, taken)


def test_a_broken_checkpoint_in_s3_is_refused_under_its_own_name(s3_server: S3Server, folder: Path, out: Path):
    from safetensors.torch import load_file, save_file

    lost = shard(folder)[1]
    lost.rename(folder.parent / "lost")
    uri = upload(s3_server, folder)
    assert f"{uri}: {INDEX} names shard {lost.name}, which is missing" in refusal(uri, out)
    tensors = load_file(folder.parent / "lost")
    first = next(iter(tensors))
    tensors[first][0] = float("nan")
    save_file(tensors, lost)
    assert f"{upload(s3_server, folder)}/{lost.name}: tensor {first} holds NaN" in refusal(uri, out)
    assert "holds no objects" in refusal(f"{uri}-none", out, ServiceError)


def test_a_plan_reads_the_headers_of_a_checkpoint_in_s3(s3_server: S3Server, folder: Path):
    facts = read_facts(spec(upload(s3_server, folder)))
    assert (facts.config_class, facts.config.num_hidden_layers, facts.size.matrices) == ("LlamaConfig", 2, 15)


def test_a_gguf_file_in_s3(s3_server: S3Server, tmp_path: Path, out: Path, tiny_checkpoint: Path):
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "tiny.gguf", tiny_checkpoint)
    uri = upload(s3_server, tmp_path / "gguf")
    assert load(spec(f"{uri}/tiny.gguf"), out=out)["layers"] == 2
    assert source_fingerprint(spec(uri)) == source_fingerprint(spec(uri))


# --- the Hugging Face hub


class Hub(BaseHTTPRequestHandler):
    """Stands in for the hub, which tests must not reach: what huggingface_hub's client asks of it."""

    commit = "0123456789" * 4
    root: Path
    served: list[str]

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        if not self.path.startswith("/api/models/org/tiny"):
            return self._file(body=True)
        *_, kind, revision = self.path.split("?")[0].split("/")
        if revision == "refs":
            one = {"name": "main", "ref": "main", "targetCommit": self.commit}
            body = json.dumps({"branches": [one], "tags": [one], "converts": []}).encode()
            return self._answer(200, body, {"Content-Type": "application/json"})
        if revision not in ("main", self.commit):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        sizes = {path.name: path.stat().st_size for path in self.root.iterdir()}
        tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
        digests = {name: hashlib.sha256((self.root / name).read_bytes()).hexdigest() for name in sizes}
        files = [{"rfilename": name, "size": size, "blobId": digests[name]} for name, size in sizes.items()]
        info = {"id": "org/tiny", "sha": self.commit, "siblings": files, "tags": [], "private": False, "downloads": 0}
        body = json.dumps(tree if kind == "tree" else info).encode()
        return self._answer(200, body, {"Content-Type": "application/json"})

    def _file(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        path = self.root / parts[-1]
        if parts[:2] != ["org", "tiny"] or not path.is_file():
            code = "EntryNotFound" if parts[:2] == ["org", "tiny"] else "RepoNotFound"
            return self._answer(404, b"", {"X-Error-Code": code})
        content = path.read_bytes()
        if body:
            self.served.append(path.name)
        headers = {"ETag": f'"{path.name}-{len(content)}"', "X-Repo-Commit": self.commit}
        return self._answer(200, content, headers, body)

    def _answer(self, status: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub with the repository org/tiny, and an empty cache."""
    handler: type[Hub] = type("TinyHub", (Hub,), {"root": folder, "served": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_hub_repository_is_downloaded_once_and_only_what_is_needed(hub: type[Hub], out: Path, tiny_checkpoint: Path):
    load(spec(f"hf:org/tiny@{hub.commit}"), out=out)
    assert names(out) == TAKEN
    assert same(out, tiny_checkpoint)
    assert set(hub.served) == TAKEN
    hub.served.clear()
    assert source_fingerprint(spec("hf:org/tiny@main")) == source_fingerprint(spec(f"hf:org/tiny@{hub.commit}"))
    shutil.rmtree(out)
    out.mkdir()
    load(spec("hf:org/tiny"), out=out)
    assert hub.served == []


@pytest.mark.slow
def test_a_tokenizer_that_transformers_knows_by_its_repository(hub: type[Hub], out: Path, monkeypatch: pytest.MonkeyPatch):
    """A few name a class that is wrong, which transformers passes by as it knows them; a copy in a folder has no such name."""
    from transformers.models.auto import tokenization_auto

    from featherweight.checkpoint.tokenizer import load_tokenizer

    known = byte_level()
    known.save_pretrained(hub.root)
    told = json.loads((hub.root / "tokenizer_config.json").read_text())
    (hub.root / "tokenizer_config.json").write_text(json.dumps(told | {"tokenizer_class": "LlamaTokenizerFast"}))
    monkeypatch.setattr(tokenization_auto, "MODEL_IDS_TO_TOKENIZERS_BACKEND", ["org/ti*"])
    text = "The river and the stone"
    assert load_tokenizer(hub.root)(text).input_ids != known(text).input_ids
    load(spec("hf:org/tiny"), out=out)
    assert load_tokenizer(out)(text).input_ids == known(text).input_ids


@pytest.mark.slow
def test_the_revisions_of_a_hub_repository_are_arrivals(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A branch and a tag at one commit are one arrival; a change of what is not read is another commit of the same content.

    Which is the content of the same checkpoint in a folder; it is downloaded once, and loading it takes it from the cache.
    """
    (one,) = look("hf:org/tiny", tmp_path / "notes", 0)
    assert (one.state, one.source) == ("ready", f"hf:org/tiny@{hub.commit}")
    assert set(hub.served) == TAKEN
    assert one.identity == content_identity(Listing.of(hub.root))
    hub.served.clear()
    (hub.root / "README.md").write_text("of no matter")
    hub.commit = "f" * 40
    (other,) = look("hf:org/tiny@main", tmp_path / "notes", 0)
    assert other.source != one.source and other.identity == one.identity and not hub.served
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match="out of reach"):
        look("hf:org/tiny", tmp_path / "notes", 0)


def test_a_hub_repository_that_is_none_is_refused(hub: type[Hub], out: Path):
    assert "no repository 'org/none'" in refusal("hf:org/none", out)
    assert "no revision 'v9'" in refusal("hf:org/tiny@v9", out)
    assert "hf:org/name" in refusal("hf:a/b/c", out)


@pytest.mark.slow
def test_a_gguf_model_on_the_hub_is_fetched_and_several_are_refused(hub: type[Hub], out: Path, tiny_checkpoint: Path):
    """Beside a config.json too, as many repositories of GGUF files have one."""
    (hub.root / "model.safetensors").unlink()
    write_gguf(hub.root / "m.gguf", tiny_checkpoint)
    load(spec("hf:org/tiny"), out=out)
    assert set(hub.served) == {"m.gguf"}
    write_gguf(hub.root / "n.gguf", tiny_checkpoint)
    hub.commit = "f" * 40
    with pytest.raises(
        CheckpointError, match=r"hf:org/tiny holds 2 GGUF models; fetch one \(hf download org/tiny m\.gguf\), and give"
    ):
        read_facts(spec("hf:org/tiny"))


def test_a_pickle_on_the_hub_is_refused_before_it_is_downloaded(hub: type[Hub], out: Path):
    pickled(hub.root, shards=False)
    assert "checkpoint.allow_pickle: true" in refusal("hf:org/tiny", out)
    assert hub.served == []
    load(spec("hf:org/tiny", allow_pickle=True), out=out)
    assert names(out) == TAKEN


@pytest.mark.slow
def test_without_the_hub_the_cache_serves_or_the_error_says_so(hub: type[Hub], out: Path, monkeypatch: pytest.MonkeyPatch):
    load(spec("hf:org/tiny"), out=out)
    before = source_fingerprint(spec("hf:org/tiny"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    shutil.rmtree(out)
    out.mkdir()
    load(spec("hf:org/tiny"), out=out)
    assert source_fingerprint(spec("hf:org/tiny")) == before
    assert facts_for_any_task(spec("hf:org/tiny")).task == "text-generation"
    shutil.rmtree(out)
    out.mkdir()
    assert "out of reach" in refusal("hf:org/other", out, ServiceError)
    with pytest.raises(ServiceError, match="out of reach and nothing is cached"):
        look_at(spec("hf:org/other"))


# --- MLflow's registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Path], Path]]:
    """Registers a folder of artifacts as version 1 of a model, alias champion; returns where the artifacts lie."""
    import mlflow

    root = tmp_path_factory.mktemp("mlflow")
    (root / "mlflow.db").write_bytes(empty_store())
    mlflow.set_tracking_uri(f"sqlite:///{root / 'mlflow.db'}")
    client = mlflow.MlflowClient()
    experiment = client.create_experiment("tests", (root / "artifacts").as_uri())

    def register(name: str, folder: Path) -> Path:
        run = client.create_run(experiment)
        client.log_artifacts(run.info.run_id, str(folder), "model")
        client.create_registered_model(name)
        location = Path(run.info.artifact_uri.removeprefix("file://")) / "model"
        version = client.create_model_version(name, location.as_uri(), run.info.run_id)
        client.set_registered_model_alias(name, "champion", version.version)
        return location

    yield register
    mlflow.set_tracking_uri(None)


@pytest.mark.slow
def test_a_registered_folder(registry: Callable[[str, Path], Path], folder: Path, out: Path):
    location = registry("plain", folder)
    before = names(location)
    load(spec("models:/plain@champion"), out=out)
    assert names(out) == TAKEN
    assert (out / WEIGHTS).read_bytes() == (location / WEIGHTS).read_bytes()
    assert names(location) == before, "the registered model was written to"
    assert source_fingerprint(spec("models:/plain@champion")) == source_fingerprint(spec("models:/plain/1"))


@pytest.mark.slow
def test_a_served_variant_inside_a_registered_pyfunc(
    registry: Callable[[str, Path], Path], folder: Path, tmp_path: Path, out: Path
):
    served = tmp_path / "pyfunc" / "artifacts" / "served"
    shutil.copytree(folder, served)
    Serving("vllm").write(served)
    (tmp_path / "pyfunc" / "MLmodel").write_text("flavors: {}\n")
    location = registry("pyfunc", tmp_path / "pyfunc")
    before = names(location)
    load(spec("models:/pyfunc/1"), out=out)
    assert names(out) == TAKEN
    assert same(out, folder)
    assert names(location) == before


def test_a_tokenizer_that_lies_apart_comes_along(registry: Callable[[str, Path], Path], folder: Path, tmp_path: Path, out: Path):
    model, tokenizer = tmp_path / "flavour" / "model", tmp_path / "flavour" / "components" / "tokenizer"
    shutil.copytree(folder, model)
    tokenizer.mkdir(parents=True)
    for path in model.glob("tokenizer*"):
        path.rename(tokenizer / path.name)
    registry("flavour", tmp_path / "flavour")
    load(spec("models:/flavour@champion"), out=out)
    assert names(out) == TAKEN


def test_registered_models_that_hold_no_checkpoint(registry: Callable[[str, Path], Path], tmp_path: Path, out: Path):
    served = tmp_path / "other" / "artifacts" / "served"
    served.mkdir(parents=True)
    Serving("ctranslate2").write(served)
    (served / "config.json").write_text("{}")
    (served / "model.bin").write_bytes(b"ct2")
    registry("packed", tmp_path / "other")
    assert "models:/packed@champion is packed for ctranslate2" in refusal("models:/packed@champion", out)
    assert "no such model" in refusal("models:/none@champion", out)
    assert "no such model" in refusal("models:/packed/7", out)
    assert "no such model" in refusal("models:/packed@nobody", out)


# --- identity


def test_the_fingerprint_follows_the_content_that_is_taken(folder: Path, tmp_path: Path):
    before = source_fingerprint(spec(folder))
    (folder / "README.md").write_text("something else")
    moved = folder.rename(tmp_path / "elsewhere")
    assert source_fingerprint(spec(moved)) == before
    with (moved / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    assert source_fingerprint(spec(moved)) != before


def test_the_fingerprint_of_a_prefix_follows_its_objects(s3_server: S3Server, folder: Path):
    uri = upload(s3_server, folder)
    before = source_fingerprint(spec(uri))
    (folder / "README.md").write_text("something else")
    assert source_fingerprint(spec(upload(s3_server, folder))) == before
    (folder / "generation_config.json").write_text("{}")
    assert source_fingerprint(spec(upload(s3_server, folder))) != before


def test_the_fingerprint_of_nothing_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not exist"):
        source_fingerprint(spec(tmp_path / "none"))


# Families


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "task"),
    [(kind, "text2text-generation") for kind in ("t5", "mt5", "mbart", "m2m_100", "marian")]
    + [(kind, "fill-mask") for kind in ("bert", "distilbert", "roberta")],
)
def test_every_family_is_loaded_for_its_task_only(tmp_path: Path, out: Path, kind: str, task: str) -> None:
    folder = family_checkpoint(kind, tmp_path / kind)
    assert load(spec(folder, task=task), out=out)["layers"] == 2
    assert inspect_checkpoint(out, task=task).parameters == sum(tensor.numel() for tensor in stored(out).values())
    other = tmp_path / "other"
    other.mkdir()
    line = refusal(folder, other)
    assert line.startswith(f"{folder} is a model for {task} (") and line.endswith(f"task is text-generation; set task: {task}")


def stored(folder: Path) -> dict[str, Any]:
    """The model's own parameters, tied ones once."""
    from transformers import AutoConfig

    from featherweight.model.architecture import auto_class

    model = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder)
    return dict(model.named_parameters())


@pytest.mark.slow
def test_a_headless_encoder_and_a_damaged_seq2seq_model_are_refused(tmp_path: Path, out: Path) -> None:
    from safetensors.torch import load_file, save_file

    damages = (
        ("bert", "fill-mask", "cls.predictions.bias", "tensor cls.predictions.bias"),
        ("t5", "text2text-generation", "decoder.block.1", "tensor decoder.block.1"),
        ("bert", "fill-mask", "cls.predictions", "is a model for feature-extraction (BertModel)"),
    )
    for kind, task, lost, reason in damages:
        folder = family_checkpoint(kind, tmp_path / lost)
        tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if not name.startswith(lost)}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        assert reason in refusal(folder, out, task=task)


def test_what_an_encoder_was_pretrained_with_beside_its_head_is_no_damage(tmp_path: Path, out: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = family_checkpoint("bert", tmp_path / "bert")
    more = {"bert.pooler.dense.weight": torch.zeros(32, 32), "cls.seq_relationship.bias": torch.zeros(2)}
    more |= {"sop_classifier.classifier.bias": torch.zeros(2)}  # ALBERT's
    save_file(load_file(folder / WEIGHTS) | more, folder / WEIGHTS, {"format": "pt"})
    assert load(spec(folder, task="fill-mask"), out=out)["layers"] == 2


def test_a_t5_with_a_head_of_its_own_keeps_it(tmp_path: Path, out: Path) -> None:
    """transformers 5 calls every T5 tied, whatever its files hold."""
    import torch
    from safetensors.torch import load_file, save_file

    from featherweight.checkpoint.opening import load_model

    folder = family_checkpoint("t5", tmp_path / "t5")
    head = torch.randn(load_file(folder / WEIGHTS)["shared.weight"].shape)
    save_file(load_file(folder / WEIGHTS) | {"lm_head.weight": head}, folder / WEIGHTS, {"format": "pt"})
    load(spec(folder, task="text2text-generation"), out=out)
    assert not inspect_checkpoint(out).tied
    assert load_model(out).get_output_embeddings().weight.equal(head)


def test_a_plan_reads_the_headers_of_a_hub_repository_and_downloads_no_weights(hub: type[Hub], tmp_path: Path):
    facts = read_facts(spec("hf:org/tiny"))
    assert (facts.config_class, facts.config.num_hidden_layers, facts.size.matrices) == ("LlamaConfig", 2, 15)
    assert facts.parameters > 0 and not (tmp_path / "hub-cache").exists()
