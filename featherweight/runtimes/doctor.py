"""`featherweight doctor`: what this machine has, what is missing, and how to get it. Nothing heavy is imported for it."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import RecipeError, ServiceError, ToolchainError, nearest
from featherweight.masking import masked
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.findings import GIB, Check
from featherweight.runtimes.gpu_findings import GpuFindings
from featherweight.system import device, machine, toolchains
from featherweight.system.servers import check_url
from featherweight.system.shipped import shipped

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.console import RenderableType

LOCK = shipped("infra/toolchains/main.txt")
# A run keeps every variant's files; below the second figure even the demo does not fit.
ROOMY_BYTES, TIGHT_BYTES = 10 * GIB, 2 * GIB
STYLES = {"ok": "green", "warn": "yellow", "missing": "red"}


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and the figures of the machine behind them."""

    checks: tuple[Check, ...]
    machine: machine.Machine
    memory_bandwidth_bytes_s: float
    gpu: GpuFindings

    @property
    def exit_code(self) -> int:
        """0, or ToolchainError's code where something essential is missing."""
        broken = any(check.essential and check.state == "missing" for check in self.checks)
        return ToolchainError.exit_code if broken else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {
            "checks": [asdict(check) for check in self.checks],
            "machine": self.machine.to_json(),
            "memory_bandwidth_bytes_s": self.memory_bandwidth_bytes_s,
            "gpu": asdict(self.gpu),
            "exit_code": self.exit_code,
        }


def diagnose(folder: Path = Path()) -> Diagnosis:
    """Look at everything that a run in `folder` needs; takes about a second, and some more where there is a GPU to be asked."""
    here, gpu = machine.describe(), GpuFindings.here()
    bandwidth = machine.memory_bandwidth_bytes_s()
    checks = [_machine(here), _cpu(here), _bandwidth(bandwidth, here), *gpu.checks(), _disk(folder)]
    checks += [_python(), _libraries(), *_engines(here), *_toolchains(), *_services()]
    return Diagnosis(tuple(checks), here, bandwidth, gpu)


def install_toolchain(name: str) -> None:
    """Install a toolchain that some engine wants. Raises RecipeError for a name that none does, ToolchainError where it fails."""
    if name not in (known := _wanted()):
        raise RecipeError(f"unknown toolchain '{name}'; {nearest(name, known)}")
    toolchains.install(name)


def render(diagnosis: Diagnosis) -> RenderableType:
    """The findings as a table, each remedy below its finding."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for check in diagnosis.checks:
        found = Text(check.found)
        if check.remedy:
            found.append(f"\n→ {check.remedy}", style="cyan")
        table.add_row(Text(check.state, style=STYLES[check.state]), Text(check.name, style="bold"), found)
    return table


def _machine(here: machine.Machine) -> Check:
    cores = f"{here.cores} of {os.cpu_count()} logical cores, {here.physical_cores} physical"
    memory = f"{here.memory_bytes / GIB:.1f} GiB of memory"
    return Check("machine", "ok", f"{here.cpu_model} ({here.architecture}, {here.system}), {cores}, {memory}")


def _cpu(here: machine.Machine) -> Check:
    features = ", ".join(sorted(here.cpu_features)) or "none that the system tells"
    if here.architecture in ("x86_64", "AMD64") and "avx2" not in here.cpu_features:
        return Check("CPU features", "warn", features, "without AVX2 the engines fall back to their slowest kernels")
    return Check("CPU features", "ok", features)


def _engines(here: machine.Machine) -> Iterator[Check]:
    """Which engines can be started, from which device they serve, and what this processor means for them."""
    where = _device(here)
    for name in RUNTIMES:
        runtime = RUNTIMES[name]
        if reason := runtime.unwritable():
            yield Check(f"engine {name}", "missing", f"its variants are skipped: {reason}")
        elif note := runtime.machine_note(here):
            yield Check(f"engine {name}", "warn", *note)
        elif reason := runtime.device_refusal(runtime.spec.model_validate({"engine": name}), where, here):
            yield Check(
                f"engine {name}", "warn", f"can be started, and not on {where}: {reason}", "say device: cpu for its variants"
            )
        else:
            yield Check(f"engine {name}", "ok", f"can be started, and serves from {where}")


def _device(here: machine.Machine) -> device.Device:
    """What `device: auto` is here; the CPU where the environment asks for a GPU that there is none of."""
    try:
        return device.resolve("auto", here)
    except ToolchainError:
        return device.CPU


def _bandwidth(bandwidth: float, here: machine.Machine) -> Check:
    """The roof: a decoder reads all its weights for each token of a batch of one."""
    tokens = bandwidth / 1e9
    found = f"{tokens:.1f} GB/s read by {here.cores} threads: at most {tokens:.0f} tokens/s from 1 GB of weights"
    return Check("memory bandwidth", "ok", found)


def _disk(folder: Path) -> Check:
    """Room where the workspace lies, or will lie."""
    free = shutil.disk_usage(folder.absolute()).free
    found = f"{free / GIB:.1f} GiB free at {folder.absolute()}"
    if free >= ROOMY_BYTES:
        return Check("disk", "ok", found)
    remedy = "free some room, or keep the workspace elsewhere: --workspace FOLDER"
    return Check("disk", "warn" if free >= TIGHT_BYTES else "missing", found, remedy, essential=True)


def _python() -> Check:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Check("Python", "ok", found)
    return Check("Python", "warn", found, "3.11 or 3.12 is what the versions were tested with: make setup PYTHON=python3.11")


def _libraries(lock: Path = LOCK) -> Check:
    """Installed versions of our dependencies against the lock that set-up installs."""
    pins = dict(locked_versions(lock))
    installed = {name: _version(name) for name in _dependencies()}
    absent = [name for name, version in installed.items() if version is None]
    moved = [f"{name} {version} (locked: {pins[name]})" for name, version in installed.items() if _differs(version, pins.get(name))]
    if absent:
        return Check("libraries", "missing", f"not installed: {', '.join(absent)}", toolchains.REMEDY, essential=True)
    if moved:
        return Check("libraries", "warn", f"other versions than tested: {', '.join(moved)}", toolchains.REMEDY)
    against = "at their locked versions" if pins else f"installed; no lock at {lock} to compare with"
    return Check("libraries", "ok", f"all {len(installed)} dependencies {against}")


def _dependencies() -> list[str]:
    """Names of the distributions that featherweight itself requires here, also where it runs from its source uninstalled."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("featherweight") or []
    except metadata.PackageNotFoundError:
        lines = tomllib.loads((toolchains.ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = [Requirement(line) for line in lines]
    return [_normal(req.name) for req in wanted if _applies(req)]


def locked_versions(lock: Path) -> Iterator[tuple[str, str]]:
    """(name, version) of every pin of a lock file that applies to this Python and system; none where there is no file."""
    from packaging.requirements import Requirement

    for line in lock.read_text().splitlines() if lock.is_file() else ():
        text = line.partition("#")[0].strip()
        if text and _applies(pin := Requirement(text)):
            yield _normal(pin.name), str(pin.specifier).removeprefix("==")


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _differs(version: str | None, pinned: str | None) -> bool:
    """Whether an installed version is not the pinned one; a build's local part (+cpu, +cu130) does not count."""
    return version is not None and pinned is not None and version.partition("+")[0] != pinned


def _wanted() -> list[str]:
    """The toolchains that the engines want."""
    runtimes = [RUNTIMES[name] for name in RUNTIMES]
    wanted = [toolchain for one in runtimes if (toolchain := one.toolchain or one.writes_with)]
    return list(dict.fromkeys([*wanted, *_optional()]))


def _optional() -> dict[str, str]:
    """The toolchains that make an engine faster, by name, and which."""
    return {toolchain: one.name for name in RUNTIMES if (toolchain := (one := RUNTIMES[name]).gains_by)}


def _toolchains() -> Iterator[Check]:
    for found in map(toolchains.status_of, _wanted()):
        name = f"toolchain {found.name}"
        if found.ready:
            yield Check(name, "ok", f"{found.package or found.name} at {found.python}")
        elif found.name in (optional := _optional()):
            kept = f"not there: {optional[found.name]} is served as its wheel has it" if found.absent else found.reason
            yield Check(name, "ok" if found.absent else "warn", kept, found.remedy)
        else:
            yield Check(name, "missing", f"{found.reason}; its variants are skipped", found.remedy)


def _services() -> Iterator[Check]:
    """The servers that the environment names; what it does not name starts by itself or is not needed."""
    embedded = "not configured: runs use an embedded one in the workspace"
    yield _service("Prefect server", ("PREFECT_API_URL",), embedded)
    yield _service("MLflow server", ("MLFLOW_TRACKING_URI",), embedded)
    endpoints = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
    yield _service("S3 endpoint", endpoints, "not configured: s3:// means AWS itself")


def _service(name: str, variables: tuple[str, ...], otherwise: str) -> Check:
    """Whether somebody answers at the address in the first of `variables` that is set."""
    variable = next((candidate for candidate in variables if os.environ.get(candidate)), None)
    if variable is None:
        return Check(name, "ok", otherwise)
    shown = masked(os.environ[variable])
    try:
        check_url(os.environ[variable], name, variable)
    except ServiceError:
        remedy = f"start it (`make stack` starts one here), or unset {variable}"
        return Check(name, "missing", f"{shown} ({variable}) does not answer", remedy, essential=True)
    return Check(name, "ok", f"{shown} ({variable})" + (" answers" if shown.startswith("http") else ""))
