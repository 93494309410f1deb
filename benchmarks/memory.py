"""What load, quantization and exports of a large checkpoint hold in memory: a made one of 1.54 billion weights in bfloat16.

Every stage runs in a process of its own, which is looked at ten times a second together with the engine's worker that it starts.
`anonymous` is what has to fit; `resident` counts the mapped pages of the checkpoint's files too, which the system takes back when
it needs their room. It wants 25 GB of disk and an hour of two cores; `python -m benchmarks.memory FOLDER STAGE...` runs some alone.
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

from featherweight.text.documents import Document, write_documents

GIB = 2**30
SHAPE: dict[str, Any] = {
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
SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "load": ("load", {}),
    "rtn int8": ("quantize", {"method": "rtn", "grid": "int8", "samples": 8, "sequence": 32}),
    "gptq int4-g32": ("quantize", {"method": "gptq", "grid": "int4-g32", "samples": 8, "sequence": 32}),
    "ctranslate2 int8": ("export", {"engine": "ctranslate2", "compute_type": "int8", "max_tokens": 64}),
    "ctranslate2 float32": ("export", {"engine": "ctranslate2", "compute_type": "float32", "max_tokens": 64}),
    "genai int8": ("compile", {"engine": "onnxruntime-genai", "precision": "int8", "max_tokens": 64}),
    "genai int4": ("compile", {"engine": "onnxruntime-genai", "precision": "int4", "max_tokens": 64}),
}


def benchmark() -> dict[str, Any]:
    """Peaks of every stage in GiB, on a checkpoint that is made for it and deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return measured(Path(folder), list(SPECS))


def measured(folder: Path, names: list[str]) -> dict[str, Any]:
    """The same for some stages, with the checkpoint in `folder`, where it is made if it is not there."""
    if not (folder / "checkpoint").exists():
        make_checkpoint(folder / "checkpoint")
        write_documents(folder / "text", [Document(str(index), "Once upon a time there was a house. " * 20) for index in range(8)])
    return {name: _peaks(folder, name) for name in names}


def make_checkpoint(folder: Path) -> None:
    """A random Qwen2 in bfloat16, in seven files, with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        whole: Any = Qwen2ForCausalLM(Qwen2Config(**SHAPE, dtype="bfloat16"))
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
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.memory", "run", str(folder), name])
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
    rounded = {key: round(value / GIB, 2) for key, value in peak.items()}
    return {"exit": process.returncode, **rounded, "seconds": round(time.monotonic() - started)}


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
    stage, options = SPECS[name]
    checkpoint, text, out = folder / "checkpoint", folder / "text", folder / "out"
    if stage == "load":
        from featherweight.checkpoint.spec import LoadSpec
        from tasks.load import load

        print(load(LoadSpec(source=str(checkpoint)), out=out))
    elif stage == "quantize":
        from featherweight.quantization.spec import QuantizeSpec
        from tasks.quantize import quantize

        print(quantize(QuantizeSpec.of(**options), checkpoint=checkpoint, text=text, calibration=text, out=out))
    else:
        from featherweight.runtimes.spec import CompileSpec, ExportSpec
        from featherweight.runtimes.writing import write_served

        kind = CompileSpec if stage == "compile" else ExportSpec
        print(write_served(kind.of(**options), checkpoint=checkpoint, calibration=text, out=out))


if __name__ == "__main__":
    where = Path(sys.argv[2] if sys.argv[1] == "run" else sys.argv[1])
    if sys.argv[1] == "run":
        run(where, sys.argv[3])
    else:
        print(json.dumps(measured(where, sys.argv[2:] or list(SPECS)), indent=1))
