"""What runs a deployed folder elsewhere: Docker Compose, a KServe InferenceService, vLLM on Kubernetes.

Each mounts the folder read-only, checks its start script by the digest in the manifest, and lets that check the rest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from featherweight.errors import RecipeError
from featherweight.registry.serving.deployment import PORT, START, Deployment
from featherweight.system.device import CPU

MOUNTED = "/mnt/models"
"""Where KServe puts what STORAGE_URI names."""
USER = 10001
VLLM_ON_CPU, VLLM_ON_GPU, OURS = "vllm/vllm-openai-cpu:v0.32.0", "vllm/vllm-openai:v0.32.0", "featherweight"
START_S = 900
NAME_LETTERS = 48


@dataclass(frozen=True)
class Manifest:
    """A file beside the deployed folder, and what starts it."""

    file: str
    text: str
    run: str


def image_of(deployment: Deployment) -> str:
    """What it runs in where nobody says another: vLLM's own image, or that of infra/Dockerfile."""
    on_vllm = VLLM_ON_CPU if deployment.device == CPU else VLLM_ON_GPU
    return on_vllm if deployment.engine == "vllm" else OURS


def storage_of(deployment: Deployment) -> str:
    """Where a cluster finds the folder where nobody says otherwise: a claim of the model's name."""
    return f"pvc://{_name(deployment)}/{deployment.version}"


def compose(deployment: Deployment, image: str, storage: str) -> Manifest:
    """A service of Docker Compose that mounts the folder around it."""
    service: dict[str, Any] = {
        "image": image,
        "entrypoint": _command(deployment),
        "environment": {name: str(value) for name, value in _environment(deployment).items()},
        "volumes": [{"type": "bind", "source": ".", "target": MOUNTED, "read_only": True}],
        "ports": [f"127.0.0.1:{PORT}:{PORT}"],
        "user": f"{USER}:{USER}",
        "read_only": True,
        "tmpfs": ["/tmp"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
        "labels": _labels(deployment),
        "healthcheck": {
            "test": ["CMD", "python3", "-c", f"import urllib.request as r; r.urlopen('http://127.0.0.1:{PORT}/health')"],
            "interval": "10s",
            "start_period": f"{START_S}s",
        },
        "deploy": {"resources": {"limits": {"cpus": str(deployment.threads), "memory": str(deployment.memory_bytes)}}},
    }
    if deployment.device != CPU:
        gpu = {"driver": "nvidia", "count": _gpus(deployment), "capabilities": ["gpu"]}
        service["deploy"]["resources"]["reservations"] = {"devices": [gpu]}
    return Manifest("compose.yaml", _dumped(deployment, {"services": {_name(deployment): service}}), "docker compose up")


def kserve(deployment: Deployment, image: str, storage: str) -> Manifest:
    """A KServe InferenceService with a predictor of its own, which KServe gives the folder at `storage`."""
    container = _container(deployment, image) | {"name": "kserve-container"}
    container["env"] = [*container["env"], {"name": "STORAGE_URI", "value": storage}]
    pod = {"securityContext": _pod_security(), **_no_token(), "containers": [container], "volumes": _volumes()}
    tree = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": _metadata(deployment),
        "spec": {"predictor": {"minReplicas": 1, **pod}},
    }
    return Manifest("inferenceservice.yaml", _dumped(deployment, tree), "kubectl apply --filename inferenceservice.yaml")


def vllm(deployment: Deployment, image: str, storage: str) -> Manifest:
    """vLLM's server as a Deployment and a Service; the folder lies on a claim, pvc://CLAIM/PATH. Raises RecipeError."""
    if deployment.engine != "vllm":
        raise RecipeError(
            f"{deployment.reference} is served by {deployment.engine}, not by vLLM; take --to kserve, compose or folder"
        )
    claim, _, path = storage.removeprefix("pvc://").partition("/")
    if not storage.startswith("pvc://") or not claim:
        raise RecipeError(f"--storage {storage}: a Deployment mounts a claim; give pvc://CLAIM/PATH")
    name, metadata = _name(deployment), _metadata(deployment)
    mount = {"name": "model", "mountPath": MOUNTED, "readOnly": True, **({"subPath": path.strip("/")} if path.strip("/") else {})}
    container = _container(deployment, image)
    container["volumeMounts"] = [*container["volumeMounts"], mount]
    pod = {
        "securityContext": _pod_security(),
        **_no_token(),
        "containers": [container],
        "volumes": [{"name": "model", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}, *_volumes()],
    }
    selector = {"app.kubernetes.io/name": name}
    workload = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": selector},
            "template": {"metadata": {"labels": metadata["labels"]}, "spec": pod},
        },
    }
    port = {"name": "http", "port": 80, "targetPort": "http"}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": metadata["labels"]},
        "spec": {"selector": selector, "ports": [port]},
    }
    text = _dumped(deployment, workload) + "---\n" + yaml.dump(service, Dumper=_Plain, sort_keys=False)
    return Manifest("vllm.yaml", text, "kubectl apply --filename vllm.yaml")


KINDS: Mapping[str, Callable[[Deployment, str, str], Manifest]] = {"kserve": kserve, "vllm": vllm, "compose": compose}


def _container(deployment: Deployment, image: str) -> dict[str, Any]:
    limits: dict[str, str] = {"cpu": str(deployment.threads), "memory": str(deployment.memory_bytes)}
    gpus = {"nvidia.com/gpu": str(_gpus(deployment))} if deployment.device != CPU else {}
    probe = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 5}
    return {
        "name": "model",
        "image": image,
        "command": _command(deployment),
        "env": [{"name": name, "value": str(value)} for name, value in _environment(deployment).items()],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {"requests": limits, "limits": {**limits, **gpus}},
        "startupProbe": {**probe, "failureThreshold": START_S // 5},
        "readinessProbe": probe,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}],
    }


def _command(deployment: Deployment) -> list[str]:
    """The start script, once it was held against its digest."""
    script = f"{MOUNTED}/{START}"
    return ["/bin/sh", "-c", f"echo '{deployment.start}  {script}' | sha256sum --check --status - && exec /bin/sh {script}"]


def _environment(deployment: Deployment) -> dict[str, Any]:
    return {"HOST": "0.0.0.0", "PORT": PORT, "HOME": "/tmp"}


def _volumes() -> list[dict[str, Any]]:
    return [{"name": "scratch", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}]


def _pod_security() -> dict[str, Any]:
    return {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"}}


def _no_token() -> dict[str, Any]:
    return {"automountServiceAccountToken": False}


def _gpus(deployment: Deployment) -> int:
    """As many as vLLM splits the layers over."""
    words = deployment.command
    option = "--tensor-parallel-size"
    return int(words[words.index(option) + 1]) if option in words else 1


def _metadata(deployment: Deployment) -> dict[str, Any]:
    return {"name": _name(deployment), "labels": _labels(deployment), "annotations": _annotations(deployment)}


def _labels(deployment: Deployment) -> dict[str, str]:
    version = {"app.kubernetes.io/version": deployment.version}
    return {"app.kubernetes.io/name": _name(deployment), **version, "app.kubernetes.io/managed-by": "featherweight"}


def _annotations(deployment: Deployment) -> dict[str, str]:
    told = {"model": deployment.model, "variant": deployment.variant, "engine": deployment.engine, "digest": deployment.digest}
    return {f"featherweight/{name}": value for name, value in told.items()}


def _name(deployment: Deployment) -> str:
    """A name as DNS takes it, at most 63 characters; where letters are lost on the way, what tells it from others of that kind."""
    plain = re.sub(r"[^a-z0-9]+", "-", deployment.model.lower()).strip("-")
    whole = len(plain) <= NAME_LETTERS and deployment.model.isascii()
    told = plain if whole else f"{plain[:NAME_LETTERS].strip('-')}-{hashlib.sha256(deployment.model.encode()).hexdigest()[:8]}"
    return told if told[:1].isalpha() else f"model-{told.strip('-')}".rstrip("-")


def _dumped(deployment: Deployment, tree: dict[str, Any]) -> str:
    head = f"# {deployment.head} as measured.\n"
    room = "# Memory is the measured peak and that of the server around it, with a quarter more.\n"
    return head + room + yaml.dump(tree, Dumper=_Plain, sort_keys=False, width=1000)


class _Plain(yaml.SafeDumper):
    """Writes what stands in two places twice: a reader need not know YAML's anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
