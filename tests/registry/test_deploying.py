"""Deploying: what is written is verified, says what was measured, starts, and is what the platforms' own schemas take."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from jsonschema import Draft202012Validator

from featherweight.errors import GateError, IntegrityError, RecipeError
from featherweight.registry.keys import Keys
from featherweight.registry.model_folder import SERVED
from featherweight.registry.serving import deployment, manifests
from featherweight.registry.serving.deployment import Deployment, start_script
from featherweight.registry.serving.oci import BUNDLE, TITLE
from featherweight.store import artifact
from featherweight.store.workspace import Workspace, local_path
from featherweight.system.processes import end_group, held_port
from flows.deploy import deploy
from tests.support.registering import MEASURED, MODEL, Bench, desk, promoted, register

pytestmark = pytest.mark.slow

__all__ = ["desk"]

TOLD = Deployment(
    model="My Model",
    version="3",
    variant="rtn8/vllm",
    engine="vllm",
    digest="d" * 64,
    device="cpu",
    threads=2,
    batch=8,
    max_tokens=512,
    memory_bytes=3 * 2**30,
    command=("python3", "-m", "vllm.entrypoints.openai.api_server", "--model", "./model/artifacts/served", "--x", "a b"),
    environment={"OMP_NUM_THREADS": "2"},
    example=("/v1/completions", {"prompt": "The"}),
    start="5" * 64,
)
GPUS = replace(TOLD, device="cuda", command=(*TOLD.command, "--tensor-parallel-size", "2"))


def written(desk: Bench, to: str, **more: str) -> Path:
    out = desk.root / "out" / to
    deploy(Workspace(desk.root, desk.registry.tracking_uri), f"{MODEL}/1", to, out, more.get("image", ""), more.get("storage", ""))
    return out


def started(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the start script does where Python is a program that tells its words and variables."""
    teller = out.parent / "teller"
    teller.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS $*"\n')
    teller.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "PYTHON": str(teller), **environment}
    return subprocess.run([str(out / "start")], cwd="/", env=env, capture_output=True, text=True, timeout=300)


def test_a_folder_holds_verified_files_and_starts_as_it_was_measured(desk: Bench) -> None:
    register(desk, "one")
    out = written(desk, "folder")
    assert {path.name for path in out.iterdir()} == {"model", "start", "SHA256SUMS", "deployment.json"}
    artifact.verify(out / "model" / SERVED, desk.registry.get(MODEL, "1").digest)
    told = json.loads((out / "deployment.json").read_text())
    assert (told["threads"], told["engine"], told["metrics"]) == (3, "torch", MEASURED)
    assert told["start"] == artifact.file_sha256(out / "start")
    done = started(out, PORT="81")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 -m uvicorn --factory featherweight.registry.serving.scoring:application ")
    assert done.stdout.endswith("--host 127.0.0.1 --port 81\n")
    assert [path.name for path in out.parent.iterdir()] == ["folder", "teller"]

    for place in ("model/artifacts/served/model.safetensors", "SHA256SUMS"):
        was = (out / place).read_bytes()
        (out / place).write_bytes(was.replace(b"o", b"0"))
        again = started(out)
        assert again.returncode == 9 and "holds other files than were deployed" in again.stderr and not again.stdout
        (out / place).write_bytes(was)
    assert started(out).returncode == 0
    venv.create(out.parent / "bare", symlinks=True)
    bare = started(out, PYTHON=str(out.parent / "bare" / "bin" / "python"))
    assert (bare.returncode, bare.stdout) == (7, "")
    assert bare.stderr.endswith("bin/python has no featherweight, which serves this; set PYTHON to one that has it\n")
    with pytest.raises(RecipeError, match="is there already"):
        written(desk, "folder")


def test_what_answers_right_from_here_alone_is_not_deployed(desk: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a champion on vLLM whose texts its own server would end elsewhere."""
    register(desk, "one")
    known = deployment.server_of
    monkeypatch.setattr(deployment, "server_of", lambda *told: replace(known(*told), here_alone="it would end texts early"))
    with pytest.raises(RecipeError, match=f"{MODEL}/1 cannot be deployed: it would end texts early; serve it so"):
        written(desk, "folder")
    assert not (desk.root / "out" / "folder").exists()


def test_what_was_altered_or_does_not_exist_is_not_deployed(desk: Bench) -> None:
    register(desk, "one")
    workspace, out = Workspace(desk.root, desk.registry.tracking_uri), desk.root / "elsewhere"
    with pytest.raises(GateError, match="has no champion"):
        deploy(workspace, MODEL, "folder", out, "", "")
    with pytest.raises(RecipeError, match="did you mean 'kserve'"):
        deploy(workspace, MODEL, "kserv", out, "", "")
    with pytest.raises(RecipeError, match="is served by torch"):
        written(desk, "vllm")
    promoted(desk, "1")
    source = Path(local_path(desk.registry.get(MODEL, "1").source) or "")
    (source / SERVED / "model.safetensors").write_bytes(b"other")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        deploy(workspace, MODEL, "folder", out, "", "")
    assert not [path for path in desk.root.iterdir() if "elsewhere" in path.name]


@pytest.mark.parametrize("told", [TOLD, GPUS, replace(TOLD, engine="ctranslate2")], ids=["cpu", "gpus", "ours"])
def test_compose_takes_what_is_written(told: Deployment) -> None:
    schema = json.loads(files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text())
    tree = yaml.safe_load(manifests.compose(told, manifests.image_of(told), "").text)
    assert not list(Draft202012Validator(schema).iter_errors(tree))
    service = tree["services"]["my-model"]
    assert service["entrypoint"][-1].startswith(f"echo '{told.start}  /mnt/models/start' | sha256sum --check")
    assert ("reservations" in service["deploy"]["resources"]) == (told.device != "cpu")
    assert service["image"].startswith("vllm/" if told.engine == "vllm" else "featherweight")
    tree["services"]["my-model"]["portz"] = []
    assert list(Draft202012Validator(schema).iter_errors(tree)), "the schema refuses what is misspelt"


def test_two_models_are_two_names_in_a_cluster() -> None:
    names = ["My Model", "on", "1e3", "ü 名", "名", "a" * 60, "a" * 61, "--", "é-1"]
    told = [manifests._name(replace(TOLD, model=name)) for name in names]
    assert told[:3] == ["my-model", "on", "model-1e3"] and len(set(told)) == len(names)
    assert all(re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name) for name in told), told


def test_whatever_a_version_is_called_it_is_no_command() -> None:
    told = replace(TOLD, variant="a\ntouch owned\n#", model="on\u2028x")
    script, others = start_script(told, ""), [make(told, "image", "pvc://c/p").text for make in manifests.KINDS.values()]
    assert "touch owned" in script and not re.search("^touch", script, re.MULTILINE)
    assert all(not re.search("^touch", text, re.MULTILINE) and list(yaml.safe_load_all(text)) for text in others)


@pytest.mark.parametrize("told", [TOLD, GPUS], ids=["cpu", "gpus"])
def test_kubernetes_takes_what_is_written(told: Deployment) -> None:
    import kubernetes_validate

    def takes(tree: dict[str, Any]) -> None:
        kubernetes_validate.validate(tree, "1.37", strict=True)

    workload, service = yaml.safe_load_all(manifests.vllm(told, "image", "pvc://claim/a/b").text)
    takes(workload)
    takes(service)
    container = workload["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"].get("nvidia.com/gpu") == (None if told.device == "cpu" else "2")
    assert {"name": "model", "mountPath": "/mnt/models", "readOnly": True, "subPath": "a/b"} in container["volumeMounts"]
    assert service["spec"]["selector"].items() <= workload["spec"]["template"]["metadata"]["labels"].items()

    text = manifests.kserve(told, "image", "s3://bucket/folder").text
    assert "&id" not in text
    inference = yaml.safe_load(text)
    pod = dict(inference["spec"]["predictor"])
    assert pod.pop("minReplicas") == 1 and inference["apiVersion"] == "serving.kserve.io/v1beta1"
    takes({"apiVersion": "v1", "kind": "Pod", "metadata": inference["metadata"], "spec": pod})
    assert pod["containers"][0]["name"] == "kserve-container"
    assert {"name": "STORAGE_URI", "value": "s3://bucket/folder"} in pod["containers"][0]["env"]
    container["imag"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        takes(workload)
    for wrong in ("s3://bucket/folder", "pvc://"):
        with pytest.raises(RecipeError, match="give pvc://CLAIM/PATH"):
            manifests.vllm(told, "image", wrong)


def test_words_of_the_command_are_words_of_the_shell() -> None:
    script = start_script(replace(TOLD, command=("python3", "$(touch x)", "a'b", "./model/it's")), "5" * 64)
    assert """'$(touch x)' 'a'"'"'b' "$PWD"/'model/it'"'"'s'""" in script


def test_an_oci_layout_holds_every_file_and_its_attestation(desk: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_KEYS", str(desk.root / "keys"))
    Keys.here().make()
    register(desk, "one")
    folder, layout = written(desk, "folder"), written(desk, "oci")
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    model, attestation = json.loads((layout / "index.json").read_text())["manifests"]
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in (layout / "blobs" / "sha256").iterdir())

    def blob(told: dict[str, Any]) -> bytes:
        content = (layout / "blobs" / "sha256" / told["digest"].removeprefix("sha256:")).read_bytes()
        assert len(content) == told["size"]
        return content

    packed = {layer["annotations"][TITLE]: blob(layer) for layer in json.loads(blob(model))["layers"]}
    there = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    signed = {"model/model.sig", "start", "SHA256SUMS", "deployment.json"}  # signatures are drawn anew
    assert packed.keys() == there.keys() - {"deployment.json"}
    assert {name: packed[name] for name in packed.keys() - signed} == {name: there[name] for name in there.keys() - signed}
    refers = json.loads(blob(attestation))
    assert refers["subject"]["digest"] == model["digest"] and refers["artifactType"] == BUNDLE
    assert blob(refers["layers"][0]) == packed["model/model.sig"]


@pytest.mark.engine
@pytest.mark.skipif("FEATHERWEIGHT_DEPLOY" not in os.environ, reason="FEATHERWEIGHT_DEPLOY=1 starts a real one")
def test_a_deployed_folder_answers(desk: Bench, tiny_checkpoint: Path) -> None:
    from featherweight.registry.lineage import build
    from featherweight.store.served_folder import Serving

    place = desk.root / "artifacts-of-runs" / "real"
    shutil.copytree(tiny_checkpoint, place)
    Serving("torch", max_tokens=64).write(place)
    ref, manifest = desk.publish(place, "real")
    graph = build([(ref, manifest)], ref.digest, variant="real", recipe="name: test", run_id=desk.run_id, metrics=MEASURED)
    desk.registry.register(desk.record("real", ref, graph))
    out = written(desk, "folder")
    with (out.parent / "log").open("wb") as log, held_port() as port:
        env = {**os.environ, "PYTHON": sys.executable, "PORT": str(port)}
        server = subprocess.Popen([str(out / "start")], cwd="/", env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            answer, deadline = None, time.monotonic() + 300
            while answer is None and time.monotonic() < deadline and server.poll() is None:
                try:
                    asked = {"inputs": ["Once upon"], "params": {"max_new_tokens": 4}}
                    answer = httpx.post(f"http://127.0.0.1:{port}/invocations", json=asked, timeout=120)
                except httpx.HTTPError:
                    time.sleep(0.2)
            assert answer is not None and answer.status_code == 200, (out.parent / "log").read_text()[-2000:]
            assert answer.json()["predictions"]
        finally:
            end_group(server)
