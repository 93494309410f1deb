"""`featherweight deploy`: a registered version, verified, as what a team's platform takes."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featherweight.errors import RecipeError, ServiceError, nearest
from featherweight.registry.out_of_band import out_of_step
from featherweight.registry.registry import Registry
from featherweight.registry.serving.deployment import MODEL, START, Deployment, deployment_of, write_folder
from featherweight.registry.serving.following import named
from featherweight.registry.serving.manifests import KINDS, image_of, storage_of
from featherweight.registry.serving.oci import write_layout
from featherweight.registry.serving.verified_copy import verified_copy
from featherweight.registry.versions import parse_reference
from featherweight.store.workspace import Workspace
from featherweight.visible import in_lines

TARGETS = (*KINDS, "folder", "oci")


@dataclass(frozen=True)
class Deployed:
    """What was written. run: what serves it. notes: what was found on the way."""

    deployment: Deployment
    folder: Path
    run: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "folder": str(self.folder)}

    def to_text(self) -> str:
        """What it is, where it lies and how it is started."""
        told = self.deployment
        what = f"{told.head}; verified, in {self.folder}"
        return in_lines([*self.notes, what, f"start it: {self.run}"])


def deploy(workspace: Workspace, reference: str, to: str, out: Path, image: str, storage: str) -> Deployed:
    """Write a verified version to the new folder `out`, whole or not at all; nothing is changed in MLflow.

    image, storage: what a container runs, and where a cluster finds the folder; by default as `manifests` says, and a claim of
    the model's name. Raises RecipeError, GateError, IntegrityError, ToolchainError, ServiceError.
    """
    if to not in TARGETS:
        raise RecipeError(f"--to {to}: {nearest(to, TARGETS)}")
    if out.exists():
        raise RecipeError(f"{out} is there already; --out names another folder")
    registry = Registry(workspace.tracking_uri)
    registry.check()
    model, wanted = parse_reference(reference, "champion")
    seen = registry.model(model)
    version, notes = named(seen, wanted), tuple(filter(None, [out_of_step(seen)]))
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            told = deployment_of(registry, verified_copy(registry, seen, version, made / MODEL))
            told = write_folder(told, made)
            run = _write(told, to, made, Path(scratch) / "layout", image, storage)
            (Path(scratch) / "layout" if to == "oci" else made).rename(out)
    except OSError as error:
        raise ServiceError(f"cannot write {out}: {error.strerror or error}") from error
    return Deployed(told, out, run.replace("OUT", shlex.quote(str(out))), notes)


def _write(told: Deployment, to: str, made: Path, layout: Path, image: str, storage: str) -> str:
    """What the platform reads, beside the folder or instead of it; and what starts it there."""
    if to == "folder":
        return f"OUT/{START}"
    if to == "oci":
        write_layout(told, made, layout)
        shutil.rmtree(made)
        return f"oras copy --from-oci-layout OUT:{told.version} REGISTRY/REPOSITORY:{told.version}"
    manifest = KINDS[to](told, image or image_of(told), storage or storage_of(told))
    (made / manifest.file).write_text(manifest.text)
    return f"cd OUT && {manifest.run}"
