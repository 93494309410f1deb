"""load: a checkpoint from wherever it lies, as a checked folder of safetensors."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from featherweight.checkpoint.conversion import adopt, named
from featherweight.checkpoint.facts import shapes_in
from featherweight.checkpoint.fetching import WORK, source_fingerprint, source_of
from featherweight.checkpoint.kept_adapters import keep_adapters
from featherweight.checkpoint.spec import LoadSpec
from featherweight.checkpoint.zeros import take_stock
from featherweight.progress import Metrics, Progress
from tasks.stage import stage

METRICS = ("parameters", "size_bytes", "vocab", "layers", "context")


@stage("load", libraries=("transformers", "safetensors", "gguf", "compressed-tensors"), source=source_fingerprint)
def load(spec: LoadSpec, *, out: Path, seed: int = 0, progress: Progress = Progress()) -> Metrics:
    """Bring a checkpoint into `out` as safetensors with its tokenizer, and check it; `spec.source` is one of

    a Hugging Face folder or a GGUF file (or a folder with one), `s3://bucket/prefix`, `hf:org/name@revision`,
    `models:/name@alias`, `models:/name/version`. All that is taken is a copy of its own; shards stay shards. The model must be
    one for `spec.task`. Weights that are quantized already (GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes) keep their integers
    where a grid holds them, as a quantize stage leaves them, and else become float; metrics `quantized_layers` and
    `dequantized_layers`.
    Names that transformers reads though they lack the model's prefix, or have that of torch.compile or DistributedDataParallel,
    and a config that contradicts the files about a tied head, are settled by what the files hold; metrics `renamed_tensors` and
    `head_settled`. Weights that transformers writes into when it loads them are what it computes with; metric
    `overwritten_tensors`. A sparse checkpoint, with a `sparsity.json` or at least half zeros in its blocks, keeps its zeros; metric
    `zero_share`. Adapters of `spec.adapters` are kept beside the checkpoint.
    Raises CheckpointError or ServiceError; then `out` is empty again.
    """
    work = out / WORK
    work.mkdir()
    try:
        found = source_of(spec)[1].fetch(spec, work, progress)
        with named(found, str(spec.source)):
            adopted = adopt(found, spec, work, out, progress)
        keep_adapters(spec, work / "kept", out, shapes_in(out), progress)
        # Coarse grids have many zeros that nobody pruned.
        zeros = take_stock(out, str(spec.source), search=not adopted.unpacked, progress=progress)
        shutil.rmtree(work)
    except BaseException:
        _clear(out)
        raise
    known = {name: float(asdict(adopted.info)[name]) for name in METRICS}
    return {**known, **adopted.settled, **adopted.unpacked, **zeros}


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
