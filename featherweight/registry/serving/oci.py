"""A deployed folder as an OCI image layout, as ORAS packs files: each file a layer by its title; its attestation refers to it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featherweight.registry.attestation import SIGNATURE
from featherweight.registry.serving.deployment import FACTS, MODEL, START, SUMS, Deployment
from featherweight.store.artifact import file_sha256

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
TYPE = "application/vnd.featherweight.model.v1"
CONFIG = "application/vnd.featherweight.deployment.v1+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
EMPTY = "application/vnd.oci.empty.v1+json"
TITLE, NAME = "org.opencontainers.image.title", "org.opencontainers.image.ref.name"


def write_layout(deployment: Deployment, folder: Path, out: Path) -> str:
    """Turn the deployed `folder` into the layout `out`; its files are moved there. Returns the digest of the model's manifest."""
    blobs = _Blobs(out)
    files = [*(folder / name for name in (START, SUMS)), *sorted(path for path in (folder / MODEL).rglob("*") if path.is_file())]
    signed = folder / MODEL / SIGNATURE
    bundle = blobs.bytes(signed.read_bytes(), BUNDLE) if signed.is_file() else None
    config = blobs.bytes((folder / FACTS).read_bytes(), CONFIG)
    layers = [blobs.moved(path, path.relative_to(folder).as_posix()) for path in files]
    model = blobs.manifest(TYPE, config, layers, annotations=_annotations(deployment))
    manifests = [{**model, "annotations": {NAME: deployment.version}}]
    if bundle is not None:
        manifests.append(blobs.manifest(BUNDLE, blobs.bytes(b"{}", EMPTY), [bundle], subject=model))
    (out / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    (out / "index.json").write_text(json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}, indent=1))
    return str(model["digest"])


def _annotations(deployment: Deployment) -> dict[str, str]:
    told = {"model": deployment.model, "version": deployment.version, "variant": deployment.variant, "served": deployment.digest}
    return {TITLE: deployment.reference, **{f"featherweight.{name}": value for name, value in told.items()}}


class _Blobs:
    """The content of a layout, by its digest."""

    def __init__(self, out: Path) -> None:
        self._folder = out / "blobs" / "sha256"
        self._folder.mkdir(parents=True)

    def bytes(self, content: bytes, media_type: str) -> dict[str, Any]:
        """Keep some bytes; what refers to them."""
        digest = hashlib.sha256(content).hexdigest()
        (self._folder / digest).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    def moved(self, path: Path, title: str) -> dict[str, Any]:
        """Take a file."""
        digest, size = file_sha256(path), path.stat().st_size
        shutil.move(path, self._folder / digest)
        layer = {"mediaType": "application/octet-stream", "digest": f"sha256:{digest}", "size": size}
        return {**layer, "annotations": {TITLE: title}}

    def manifest(
        self, kind: str, config: Mapping[str, Any], layers: list[dict[str, Any]], **more: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Keep a manifest; what refers to it."""
        tree = {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": kind, "config": config, "layers": layers, **more}
        return {**self.bytes(json.dumps(tree, sort_keys=True).encode(), MANIFEST), "artifactType": kind}
