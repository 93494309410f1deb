"""What Featherweight makes of a checkpoint beside what other tools make of it by their own commands, in one run, by turns.

Each side is an engine in a process and an environment of its own, with as many threads, and writes as many tokens behind the same
prompts, greedily. Told are tokens per second, of a long prompt the seconds to its first token, the ratio to PyTorch's eager float32
of the same round (median of the rounds, 95 % bootstrap interval), the share of tokens before the text is another than eager's, and
the size. Of Featherweight's own variants the change in bits per byte is told too, which other tools do not measure. What cannot be
made or run is told with its reason.

Environments lie in `build/peers`. PEERS_MODEL is what to take in place of stories15M: a folder, a GGUF file, or the name of a shape
in which random weights are drawn (qwen2.5-0.5b, t5-small, mbart-large-50); PEERS_TEXT, the text that the quality is measured on;
PEERS_ROUNDS, how many rounds; PEERS_VARIANTS, the recipe's variants in place of those of its file; PEERS_WITHOUT, other tools that
are left out, by the beginnings of their names between commas. The same command goes on with what an earlier one made.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.peers.subjects import DECODER, ENCODER_DECODER, Subject, subject
from featherweight.errors import one_line
from featherweight.measure.statistics import bootstrap_median_ratio
from featherweight.system import toolchains

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PLACE = ROOT / "build" / "peers"
ROUNDS = int(os.environ.get("PEERS_ROUNDS", "9"))
BASE = "PyTorch eager float32"


@dataclass(frozen=True)
class Case:
    """What is asked for at once: sequences, tokens of each prompt, tokens to write behind it."""

    batch: int
    prompt: int
    new: int

    @property
    def name(self) -> str:
        """By which its figures are called."""
        return f"prefill_{self.prompt}" if self.new == 1 else str(self.batch)


CASES = (Case(1, 32, 64), Case(8, 32, 64), Case(1, 512, 1))


@dataclass
class Peer:
    """A side. kind: of clients.py. made_by: the commands that make its folder, {out}, by the Python of its environment.

    environment: a file of requirements beside this one, or a toolchain; None for the main environment.
    """

    name: str
    kind: str
    made_by: tuple[tuple[str, ...], ...] = ()
    environment: str | None = None
    folder: Path | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def others(subject: Subject) -> list[Peer]:
    """Other tools on the checkpoint, by the commands that their documentation names."""
    model = str(subject.folder)
    converter = ("-m", "ctranslate2.converters.transformers", "--model", model, "--quantization", "int8", "--force")
    both = [
        Peer(BASE, "eager", folder=subject.folder),
        Peer("torch.compile float32", "torch_compile", folder=subject.folder),
        Peer("CTranslate2's converter, int8", "ctranslate2", ((*converter, "--output_dir", "{out}"),)),
    ]
    return both + (_of_decoders(model) if subject.task == DECODER else _of_encoder_decoders(model))


def _of_decoders(model: str) -> list[Peer]:
    export = ("-m", "optimum.commands.optimum_cli", "export", "openvino", "-m", model, "--task", "text-generation-with-past")
    builder = ("-m", "onnxruntime_genai.models.builder", "-i", model, "-e", "cpu", "-c", str(PLACE / "cache"), "-o", "{out}")
    olive = ("-m", "olive", "optimize", "-m", model, "--device", "cpu", "--provider", "CPUExecutionProvider", "-o", "{out}")
    four = ("--weight-format", "int4", "--group-size", "32")
    return [
        Peer("vLLM bfloat16", "vllm", environment="vllm", folder=Path(model)),
        Peer("ONNX Runtime GenAI's builder, int8", "genai", ((*builder, "-p", "int8"),)),
        Peer("ONNX Runtime GenAI's builder, int4", "genai", ((*builder, "-p", "int4"),)),
        Peer("Olive 0.13, int8", "genai", ((*olive, "--precision", "int8"),), "olive.txt"),
        Peer("Olive 0.13, int4", "genai", ((*olive, "--precision", "int4"),), "olive.txt"),
        Peer("optimum-intel, OpenVINO int8", "openvino", ((*export, "--weight-format", "int8", "{out}"),), "openvino.txt"),
        Peer("optimum-intel, OpenVINO int4", "openvino", ((*export, *four, "{out}"),), "openvino.txt"),
    ]


def _of_encoder_decoders(model: str) -> list[Peer]:
    cli, task = ("-m", "optimum.commands.optimum_cli"), ("--task", "text2text-generation-with-past")
    export = (*cli, "export", "onnx", "-m", model, *task)
    quantize = (*cli, "onnxruntime", "quantize", "--avx512_vnni", "--per_channel", "--onnx_model", "{out}.float", "-o", "{out}")
    openvino = (*cli, "export", "openvino", "-m", model, *task, "--weight-format", "int8", "{out}")
    return [
        Peer("Optimum O3, ONNX Runtime float32", "optimum", ((*export, "--optimize", "O3", "{out}"),), "optimum"),
        Peer("Optimum, ONNX Runtime int8", "optimum", ((*export, "{out}.float"), quantize), "optimum"),
        Peer("optimum-intel, OpenVINO int8", "openvino", (openvino,), "openvino.txt"),
    ]


def benchmark() -> Mapping[str, Any]:
    """The figures of every side."""
    chosen = subject(os.environ.get("PEERS_MODEL", str(ROOT.parent / "shared" / "models" / "stories15M")), PLACE / "models")
    cases = [case for case in CASES if case.prompt + case.new <= chosen.positions]
    left_out = tuple(filter(None, os.environ.get("PEERS_WITHOUT", "").split(",")))
    peers = [*(peer for peer in others(chosen) if not peer.name.startswith(left_out)), *ours(chosen, cases)]
    sides = {peer.name: started for peer in peers if (started := _started(peer, chosen, cases))}
    try:
        taken = _by_turns(sides, chosen, cases)
    finally:
        for side in sides.values():
            side.close()
    return {
        "model": chosen.name,
        "random_weights": chosen.random,
        "threads": _threads(),
        "rounds": ROUNDS,
        "cases": {case.name: asdict(case) for case in cases},
        "sides": [_figures(peer, taken.get(peer.name), taken[BASE], cases) for peer in peers],
    }


def ours(subject: Subject, cases: list[Case]) -> Iterator[Peer]:
    """Featherweight's own, made by one optimization, and GGUF files among them, for llama.cpp's own server."""
    workspace = PLACE / "workspaces" / subject.name
    workspace.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"checkpoint.source": subject.folder}
    told |= {"workload.max_tokens": max(case.prompt + case.new for case in cases)}
    if subject.task == ENCODER_DECODER:
        told |= {"data.source": _pairs(workspace / "pairs.jsonl")}
    elif not subject.random:
        told |= {"data.source": os.environ.get("PEERS_TEXT", str(ROOT.parent / "shared" / "data" / "tinystories-excerpt"))}
    if variants := os.environ.get("PEERS_VARIANTS"):
        told |= {"variants": variants}
    command = [str(Path(sys.executable).with_name("featherweight")), "optimize", str(HERE / subject.recipe), "--json"]
    sets = [word for key, value in told.items() for word in ("--set", f"{key}={value}")]
    ran = subprocess.run([*command, "-w", str(workspace), *sets], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    folders = {
        json.loads(file.read_text())["node"]: file.parent for file in workspace.glob("artifacts/*/artifacts/artifact/manifest.json")
    }
    result = json.loads(ran.stdout or "{}")
    if "variants" not in result:
        raise SystemExit(f"featherweight optimize {subject.recipe} made nothing, with exit code {ran.returncode}")
    for row in result["variants"]:
        name, metrics = row["name"], row["metrics"]
        if name == "baseline":
            continue
        notes: dict[str, Any] = {"reason": row["reason"]}
        if row["status"] in ("winner", "loser"):
            ends = [metrics.get(f"quality_change_{end}") for end in ("low", "high")]
            notes = {} if subject.random else {"quality_change": metrics.get("quality_change"), "interval": ends}
        file = folders[name] / "model.gguf" if name in folders else None
        if file and file.exists():
            yield Peer(f"llama.cpp {name}", "llama_cpp", folder=file, notes=notes)
        else:
            yield Peer(f"ours: {name}", "featherweight", folder=folders.get(name), notes=notes)


def _pairs(file: Path) -> Path:
    """Texts and what is to come of them, which random weights make nothing of."""
    rows = [
        {"source": f"The river runs by house number {index}.", "target": f"House {index} stands at the river."}
        for index in range(200)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Side:
    """A client at work."""

    def __init__(self, peer: Peer, python: Path, cases: list[Case]) -> None:
        assert peer.folder is not None
        numbers = map(str, (_threads(), max(case.prompt + case.new for case in cases), max(case.batch for case in cases)))
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


def _started(peer: Peer, subject: Subject, cases: list[Case]) -> Side | None:
    print(f"{peer.name} ...", file=sys.stderr, flush=True)
    try:
        python = _python(peer.environment)
        if peer.made_by:
            peer.folder = _made(peer, python, subject)
        if "reason" in peer.notes:
            return None
        side = Side(peer, python, cases)
        for case in cases:  # the first of each compiles, or fills what is kept
            side.write(_prompts(subject, case, 0), case.new)
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


def _made(peer: Peer, python: Path, subject: Subject) -> Path:
    """The folder that the peer's own commands write."""
    out = PLACE / "made" / subject.name / _slug(peer.name)
    commands = [[word.format(out=out) for word in command] for command in peer.made_by]
    if not (out / "made.txt").exists():
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        log = out.with_suffix(".log")
        with log.open("w") as file:
            for command in commands:
                done = subprocess.run([str(python), *command], stdout=file, stderr=file, env=_environment(), cwd=PLACE)
                if done.returncode:
                    break
        if done.returncode or not any(out.glob("*")):
            raise OSError(f"its command wrote nothing, with exit code {done.returncode}: {_last(log)}")
        (out / "made.txt").write_text("\n".join(map(" ".join, commands)))
    configs = [*out.glob("genai_config.json"), *out.glob("*/genai_config.json")]
    return configs[0].parent if configs else out


Taken = dict[str, list[dict[str, Any]]]
"""By case, what came of each round."""


def _by_turns(sides: Mapping[str, Side], subject: Subject, cases: list[Case]) -> dict[str, Taken]:
    """Every round, case and side; the sides in another order each time."""
    taken: dict[str, Taken] = {name: {case.name: [] for case in cases} for name in sides}
    for turn in range(1, ROUNDS + 1):
        for case in cases:
            names, prompts = list(sides), _prompts(subject, case, turn)
            Random(turn).shuffle(names)
            for name in names:
                taken[name][case.name].append(sides[name].write(prompts, case.new))
        print(f"round {turn} of {ROUNDS}", file=sys.stderr, flush=True)
    return taken


def _prompts(subject: Subject, case: Case, seed: int) -> list[list[int]]:
    size = json.loads((subject.folder / "config.json").read_text())["vocab_size"]
    draw = Random(1000 * case.batch + seed)
    return [[draw.randrange(size // 10, size) for _ in range(case.prompt)] for _ in range(case.batch)]


def _figures(peer: Peer, taken: Taken | None, base: Taken, cases: list[Case]) -> dict[str, Any]:
    if taken is None:
        return {"name": peer.name, **peer.notes}
    found: dict[str, Any] = {"name": peer.name, "size_bytes": _size(peer), **peer.notes}
    shares = []
    for case in cases:
        rows, theirs = taken[case.name], base[case.name]
        seconds, eager = ([one["seconds"] for one in turns] for turns in (rows, theirs))
        ratio = bootstrap_median_ratio(eager, seconds, seed=case.batch)
        found[f"speedup_{case.name}"] = [round(one, 3) for one in (ratio.value, ratio.low, ratio.high)]
        if case.new == 1:
            found[f"seconds_{case.name}"] = round(statistics.median(seconds), 4)
            continue
        found[f"tokens_per_s_{case.name}"] = round(case.batch * case.new / statistics.median(seconds), 1)
        shares += _shares(peer, rows, theirs, case.new)
    return found | ({"same_tokens": round(statistics.mean(shares), 3)} if shares else {})


def _shares(peer: Peer, rows: list[dict[str, Any]], theirs: list[dict[str, Any]], new: int) -> list[float]:
    """Of each text the share of tokens before the first that is not eager's; none where the engine tells no tokens."""
    texts, eager = ([text for row in turns for text in row["tokens"]] for turns in (rows, theirs))
    if odd := [text for text in texts if (text if isinstance(text, int) else len(text)) != new]:
        raise SystemExit(f"{peer.name} wrote a text of another length than {new} tokens: {odd[0]}")
    return [] if isinstance(texts[0], int) else [_same(one, other) for one, other in zip(texts, eager, strict=True)]


def _same(text: list[int], other: list[int]) -> float:
    return next((at for at, (one, two) in enumerate(zip(text, other, strict=True)) if one != two), len(text)) / len(text)


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
