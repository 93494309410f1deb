"""What Featherweight makes of a checkpoint beside what other tools make of it by their own commands, in one run, by turns.

Each side is an engine in a process and an environment of its own, with as many threads, and writes as many tokens behind the same
prompts, greedily. Told are tokens per second, the ratio to PyTorch's eager float32 of the same round (median of the rounds, 95 %
bootstrap interval), the share of tokens before the text is another than eager's, and the size. Of Featherweight's own variants the
change in bits per byte is told too, which other tools do not measure. What cannot be made or run is told with its reason.
Environments lie in `build/peers`; set PEERS_MODEL to a folder to take another checkpoint than stories15M's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from featherweight.errors import one_line
from featherweight.measure.statistics import bootstrap_median_ratio
from featherweight.system import toolchains

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PLACE = ROOT / "build" / "peers"
PROMPT, NEW, BATCHES, ROUNDS, MAX_TOKENS = 32, 64, (1, 8), 9, 256
OURS = {
    "gptq8/genai-int8": "ours: gptq int8, ONNX Runtime GenAI",
    "gptq8-g32/genai-int8": "ours: gptq int8-g32, ONNX Runtime GenAI",
    "gptq4/genai-int4": "ours: gptq int4-g32, ONNX Runtime GenAI",
    "rtn8/ctranslate2-int8": "ours: rtn int8, CTranslate2",
}
"""Featherweight's variants that are compared, as they are called in the recipe beside this file."""
FILES = {"rtn8-g32/q8": "llama.cpp Q8_0", "rtn4-g32/q4": "llama.cpp Q4_0", "q4k": "llama.cpp Q4_K"}
"""GGUF files, which Featherweight wrote, for llama.cpp's own server."""


@dataclass
class Peer:
    """A side. kind: of clients.py. made_by: the command that makes its folder, by the Python of its environment.

    environment: a file of requirements beside this one, or a toolchain; None for the main environment.
    """

    name: str
    kind: str
    made_by: tuple[str, ...] = ()
    environment: str | None = None
    folder: Path | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def others(model: Path) -> list[Peer]:
    """Other tools on the checkpoint, by the commands that their documentation names."""
    export = ("-m", "optimum.commands.optimum_cli", "export", "openvino", "-m", str(model), "--task", "text-generation-with-past")
    builder = ("-m", "onnxruntime_genai.models.builder", "-i", str(model), "-e", "cpu", "-c", str(PLACE / "cache"))
    olive = ("-m", "olive", "optimize", "-m", str(model), "--device", "cpu", "--provider", "CPUExecutionProvider")
    converter = ("-m", "ctranslate2.converters.transformers", "--model", str(model), "--quantization", "int8", "--force")
    return [
        Peer("PyTorch eager float32", "eager", folder=model),
        Peer("torch.compile float32", "torch_compile", folder=model),
        Peer("vLLM bfloat16", "vllm", environment="vllm", folder=model),
        Peer("CTranslate2's converter, int8", "ctranslate2", (*converter, "--output_dir")),
        Peer("ONNX Runtime GenAI's builder, int8", "genai", (*builder, "-p", "int8", "-o")),
        Peer("ONNX Runtime GenAI's builder, int4", "genai", (*builder, "-p", "int4", "-o")),
        Peer("Olive 0.13, int8", "genai", (*olive, "--precision", "int8", "-o"), "olive.txt"),
        Peer("Olive 0.13, int4", "genai", (*olive, "--precision", "int4", "-o"), "olive.txt"),
        Peer("optimum-intel, OpenVINO int8", "openvino", (*export, "--weight-format", "int8"), "openvino.txt"),
        Peer(
            "optimum-intel, OpenVINO int4", "openvino", (*export, "--weight-format", "int4", "--group-size", "32"), "openvino.txt"
        ),
    ]


def benchmark() -> Mapping[str, Any]:
    """The figures of every side."""
    model = Path(os.environ.get("PEERS_MODEL", ROOT.parent / "shared" / "models" / "stories15M")).absolute()
    if not model.is_dir():
        raise SystemExit(f"{model} is no folder; set PEERS_MODEL to a checkpoint of a causal language model")
    PLACE.mkdir(parents=True, exist_ok=True)
    peers = [*others(model), *ours(model)]
    sides = {peer.name: started for peer in peers if (started := _started(peer, model))}
    try:
        taken = _by_turns(sides, model)
    finally:
        for side in sides.values():
            side.close()
    base = "PyTorch eager float32"
    return {
        "model": model.name,
        "threads": _threads(),
        "workload": {"prompt_tokens": PROMPT, "new_tokens": NEW, "batch_sizes": BATCHES, "rounds": ROUNDS},
        "sides": [_figures(peer, taken.get(peer.name), taken[base]) for peer in peers],
    }


def ours(model: Path) -> Iterator[Peer]:
    """Featherweight's own, made by one optimization, and the GGUF files among them."""
    workspace = PLACE / "workspace"
    command = [
        str(Path(sys.executable).with_name("featherweight")),
        "optimize",
        str(HERE / "recipe.yaml"),
        "--json",
        "-w",
        str(workspace),
    ]
    data = os.environ.get("PEERS_TEXT", str(ROOT.parent / "shared" / "data" / "tinystories-excerpt"))
    told = subprocess.run(
        [*command, "--set", f"checkpoint.source={model}", "--set", f"data.source={data}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    rows = {row["name"]: row for row in json.loads(told.stdout)["variants"]}
    folders = {
        json.loads(file.read_text())["node"]: file.parent for file in workspace.glob("artifacts/*/artifacts/artifact/manifest.json")
    }
    for name, title in {**OURS, **FILES}.items():
        row = rows[name]
        notes = {
            "quality_change": row["metrics"].get("quality_change"),
            "interval": [row["metrics"].get(f"quality_change_{end}") for end in ("low", "high")],
        }
        if row["status"] not in ("winner", "loser"):
            notes = {"reason": row["reason"]}
        kind, folder = ("llama_cpp", folders[name] / "model.gguf") if name in FILES else ("featherweight", folders[name])
        yield Peer(title, kind, folder=folder, notes=notes)


class Side:
    """A client at work."""

    def __init__(self, peer: Peer, python: Path) -> None:
        assert peer.folder is not None
        numbers = map(str, (_threads(), MAX_TOKENS, max(BATCHES)))
        self.log = (PLACE / f"{_slug(peer.name)}.log").open("w")
        self.process = subprocess.Popen(
            [str(python), str(HERE / "clients.py"), peer.kind, str(peer.folder), *numbers],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=_environment(),
            start_new_session=True,
        )  # fmt: skip
        self._answer()

    def write(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Seconds and tokens."""
        assert self.process.stdin
        print(json.dumps({"prompts": prompts, "new": new}), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise OSError(f"ended with exit code {self.process.wait()}: {_last(Path(self.log.name))}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End it and what it has started, such as vLLM's engine."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _started(peer: Peer, model: Path) -> Side | None:
    print(f"{peer.name} ...", file=sys.stderr, flush=True)
    try:
        python = _python(peer.environment)
        if peer.made_by:
            peer.folder = _made(peer, python)
        if "reason" in peer.notes:
            return None
        side = Side(peer, python)
        for batch in BATCHES:  # the first of each batch size compiles, or fills what is kept
            side.write(_prompts(model, batch, 0), NEW)
        return side
    except (OSError, subprocess.CalledProcessError) as error:
        peer.notes["reason"] = one_line(str(error).replace(f"{ROOT}/", ""), 300)
        return None


def _python(environment: str | None) -> Path:
    """The Python of an environment, which is made where it is not there."""
    if environment is None:
        return Path(sys.executable)
    if not environment.endswith(".txt"):
        return toolchains.python(environment)
    place = PLACE / Path(environment).stem
    if not (place / "ready").exists():
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--clear", "-q", "--python", sys.executable, str(place)], check=True)
        python = str(place / "bin" / "python")
        subprocess.run([*uv, "pip", "install", "-q", "--python", python, "-r", str(HERE / environment)], check=True)
        (place / "ready").touch()
    return place / "bin" / "python"


def _made(peer: Peer, python: Path) -> Path:
    """The folder that the peer's own command writes."""
    out = PLACE / "made" / _slug(peer.name)
    if not (out / "made.txt").exists():
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        log = PLACE / f"{_slug(peer.name)}.made.log"
        with log.open("w") as file:
            done = subprocess.run([str(python), *peer.made_by, str(out)], stdout=file, stderr=file, env=_environment(), cwd=PLACE)
        if done.returncode or not any(out.glob("*")):
            raise OSError(f"its command wrote nothing, with exit code {done.returncode}: {_last(log)}")
        (out / "made.txt").write_text(" ".join(peer.made_by))
    configs = [*out.glob("genai_config.json"), *out.glob("*/genai_config.json")]
    return configs[0].parent if configs else out


def _by_turns(sides: Mapping[str, Side], model: Path) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Every round, batch size and side; the sides in another order each time."""
    taken: dict[str, dict[int, list[dict[str, Any]]]] = {name: {batch: [] for batch in BATCHES} for name in sides}
    for turn in range(1, ROUNDS + 1):
        for batch in BATCHES:
            names, prompts = list(sides), _prompts(model, batch, turn)
            Random(turn).shuffle(names)
            for name in names:
                taken[name][batch].append(sides[name].write(prompts, NEW))
        print(f"round {turn} of {ROUNDS}", file=sys.stderr, flush=True)
    return taken


def _prompts(model: Path, batch: int, seed: int) -> list[list[int]]:
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    draw = Random(1000 * batch + seed)
    return [[draw.randrange(size // 10, size) for _ in range(PROMPT)] for _ in range(batch)]


def _figures(peer: Peer, taken: dict[int, list[dict[str, Any]]] | None, base: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    if taken is None:
        return {"name": peer.name, **peer.notes}
    found: dict[str, Any] = {"name": peer.name, "size_bytes": _size(peer), **peer.notes}
    for batch in BATCHES:
        seconds, theirs = ([one["seconds"] for one in rows[batch]] for rows in (taken, base))
        ratio = bootstrap_median_ratio(theirs, seconds, seed=batch)
        found[f"speedup_{batch}"] = [round(one, 3) for one in (ratio.value, ratio.low, ratio.high)]
        found[f"tokens_per_s_{batch}"] = round(batch * NEW / statistics.median(seconds), 1)
    texts = [text for batch in BATCHES for row in taken[batch] for text in row["tokens"]]
    if odd := [text for text in texts if (text if isinstance(text, int) else len(text)) != NEW]:
        raise SystemExit(f"{peer.name} wrote a text of another length than {NEW} tokens: {odd[0]}")
    if not isinstance(texts[0], int):
        theirs = [text for batch in BATCHES for row in base[batch] for text in row["tokens"]]
        found["same_tokens"] = round(statistics.mean(map(_same, texts, theirs)), 3)
    return found


def _same(text: list[int], other: list[int]) -> float:
    """The share of tokens before the first that differs."""
    return next((at for at, (one, two) in enumerate(zip(text, other, strict=True)) if one != two), NEW) / NEW


def _size(peer: Peer) -> int:
    assert peer.folder is not None
    files = [peer.folder] if peer.folder.is_file() else [file for file in peer.folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _threads() -> int:
    return len(os.sched_getaffinity(0))


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(_threads()), "OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def _last(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line.strip() for line in reversed(lines) if "Error" in line or "Exception" in line), lines[-1] if lines else "")
