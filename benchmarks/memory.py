"""What stages hold in memory: those of a large checkpoint, which leave it in its files, and all others of a smaller one.

The large one is a made decoder of 1.54 billion weights in bfloat16, that of what holds the whole model one of 0.21 billion. Every
stage runs in a process of its own, which is looked at ten times a second together with the processes that it starts. `anonymous`
is what has to fit; `resident` counts the mapped pages of the files too, which the system takes back when it needs their room; `gpu`
is what its tensors take of a GPU, where there is one. It wants 25 GB of disk and some hours of two cores; `python -m
benchmarks.memory FOLDER STAGE...` runs some alone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featherweight.system.device import GPU_PEAK, GpuPeak
from featherweight.text.documents import Document, write_documents

GIB = 2**30
LARGE: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
"""Qwen2.5-1.5B's, with random weights."""
SMALL: dict[str, Any] = LARGE | {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
SHAPES = {"large": LARGE, "small": SMALL}
ROUNDS = {"samples": 8, "sequence": 32}
TRAINS = {"steps": 2, "batch": 2, "sequence": 32}
SPECS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "load": ("large", "load", {}),
    "rtn int8": ("large", "quantize", {"method": "rtn", "grid": "int8", **ROUNDS}),
    "gptq int4-g32": ("large", "quantize", {"method": "gptq", "grid": "int4-g32", **ROUNDS}),
    "smoothquant int8": ("large", "quantize", {"method": "smoothquant", "grid": "int8", **ROUNDS}),
    "awq int4-g32": ("large", "quantize", {"method": "awq", "grid": "int4-g32", **ROUNDS}),
    "ctranslate2 int8": ("large", "export", {"engine": "ctranslate2", "compute_type": "int8", "max_tokens": 64}),
    "ctranslate2 float32": ("large", "export", {"engine": "ctranslate2", "compute_type": "float32", "max_tokens": 64}),
    "genai int8": ("large", "compile", {"engine": "onnxruntime-genai", "precision": "int8", "max_tokens": 64}),
    "genai int4": ("large", "compile", {"engine": "onnxruntime-genai", "precision": "int4", "max_tokens": 64}),
    "small gptq": ("small", "quantize", {"method": "gptq", "grid": "int4-g32", **ROUNDS}),
    "small smoothquant": ("small", "quantize", {"method": "smoothquant", "grid": "int8", **ROUNDS}),
    "small awq": ("small", "quantize", {"method": "awq", "grid": "int4-g32", **ROUNDS}),
    "small autoround": ("small", "quantize", {"method": "autoround", "grid": "int4-g32", "steps": 2, **ROUNDS}),
    "small qat": ("small", "quantize", {"method": "qat", "grid": "int8", "start": "rtn", "steps": 2, "batch": 2, **ROUNDS}),
    "small sensitivity": (
        "small",
        "sensitivity",
        {"grid": "int4-g32", "head": "int8", "finer": "int8", "scale": "absmax", **ROUNDS},
    ),
    "small prune": ("small", "prune", {"method": "width", "samples": 4, "sequence": 32, "finetune": None}),
    "small distill": ("small", "distill", {"layers": 8, **TRAINS}),
    "small finetune": ("small", "finetune", TRAINS),
    "small generate": ("small", "generate", {"samples": 2, "sequence": 32}),
    "small llama.cpp": ("small", "export", {"engine": "llama.cpp", "precision": "float16", "max_tokens": 64}),
    "small openvino": ("small", "compile", {"engine": "openvino", "precision": "int8", "max_tokens": 64}),
    "small torch-compile": ("small", "compile", {"engine": "torch-compile", "max_tokens": 64}),
}
"""By name: the checkpoint, the stage, and what it is told."""


def benchmark() -> dict[str, Any]:
    """Peaks of every stage in GiB, on checkpoints that are made for it and deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return measured(Path(folder), list(SPECS))


def measured(folder: Path, names: list[str]) -> dict[str, Any]:
    """The same for some stages, with the checkpoints in `folder`, where they are made if they are not there."""
    for shape in sorted({SPECS[name][0] for name in names}):
        if not (folder / shape).exists():
            make_checkpoint(folder / shape, SHAPES[shape])
    write_documents(folder / "text", [Document(str(index), "Once upon a time there was a house. " * 20) for index in range(8)])
    return {name: _peaks(folder, name) for name in names}


def make_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """A random Qwen2 in bfloat16, in files of 500 MB, with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        whole: Any = Qwen2ForCausalLM(Qwen2Config(**shape, dtype="bfloat16"))
        model = whole.to(torch.bfloat16)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        weight.data.fill_(1.0) if "norm" in name else weight.data.normal_(0, 0.02)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="500MB")
    bpe = Tokenizer(
        models.BPE(vocab={letter: id for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)


def _peaks(folder: Path, name: str) -> dict[str, Any]:
    """Run one stage in a process of its own; peaks of it and its children together, in GiB, and its CPU time."""
    out, said = folder / "out", folder / "said"  # a pipe that nobody reads meanwhile would stop it once it is full
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    started = time.monotonic()
    with said.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.memory", "run", str(folder), name], stdout=stream)
    peak = {"anonymous": 0, "resident": 0, "stage_anonymous": 0}
    while process.poll() is None:
        own, below = _memory(process.pid), [_memory(pid) for pid in _children(process.pid)]
        now = {
            "anonymous": sum(one["RssAnon"] for one in (own, *below)),
            "resident": sum(one["VmRSS"] for one in (own, *below)),
            "stage_anonymous": own["RssAnon"],
        }
        peak = {key: max(peak[key], now[key]) for key in peak}
        time.sleep(0.1)
    shutil.rmtree(out)
    seconds = round(time.monotonic() - started)
    metrics = json.loads(said.read_text().splitlines()[-1]) if process.returncode == 0 else {}
    if GPU_PEAK in metrics:
        peak["gpu"] = metrics[GPU_PEAK]
    rounded = {key: round(value / GIB, 2) for key, value in peak.items()}
    return {"exit": process.returncode, **rounded, "seconds": seconds, "metrics": metrics}


def _memory(pid: int) -> dict[str, int]:
    """VmRSS and RssAnon of a process in bytes; 0 where it is gone."""
    found = {"VmRSS": 0, "RssAnon": 0}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return found
    told = (line.split() for line in lines)
    return found | {words[0].rstrip(":"): 1024 * int(words[1]) for words in told if words[0].rstrip(":") in found}


def _children(pid: int) -> Iterator[int]:
    """All descendants of a process."""
    try:
        own = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return
    for child in own:
        yield child
        yield from _children(child)


def run(folder: Path, name: str) -> None:
    """One stage, in this process."""
    from tasks.stages import stage_named

    shape, kind, options = SPECS[name]
    stage, text = stage_named(kind), folder / "text"
    inputs = {"checkpoint": folder / shape, "text": text, "calibration": text}
    given = {name: inputs[name] for name in inputs if stage.takes(name)}
    peak = GpuPeak()
    metrics = dict(stage(_spec(kind, folder / shape, options), out=folder / "out", **given))
    print(json.dumps(metrics | peak.metrics()))


def _spec(stage: str, checkpoint: Path, options: dict[str, Any]) -> Any:
    from featherweight.checkpoint.spec import LoadSpec
    from featherweight.distillation.spec import DistillSpec, GenerateSpec
    from featherweight.pruning.spec import PruneSpec
    from featherweight.quantization.spec import QuantizeSpec, SensitivitySpec
    from featherweight.runtimes.spec import CompileSpec, ExportSpec
    from featherweight.training.spec import FinetuneSpec

    plain: dict[str, Any] = {
        "distill": DistillSpec,
        "finetune": FinetuneSpec,
        "generate": GenerateSpec,
        "sensitivity": SensitivitySpec,
    }
    named: dict[str, Any] = {"quantize": QuantizeSpec, "prune": PruneSpec, "export": ExportSpec, "compile": CompileSpec}
    if stage == "load":
        return LoadSpec(source=str(checkpoint))
    return named[stage].of(**options) if stage in named else plain[stage](**options)


if __name__ == "__main__":
    where = Path(sys.argv[2] if sys.argv[1] == "run" else sys.argv[1])
    if sys.argv[1] == "run":
        run(where, sys.argv[3])
    else:
        print(json.dumps(measured(where, sys.argv[2:] or list(SPECS)), indent=1))
