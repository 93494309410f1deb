"""Every stage that writes weights, one after the other on a tiny model: the digests of what they write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from featherweight.distillation.spec import DistillSpec, GenerateSpec
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.runtimes.spec import CompileSpec, ExportSpec
from featherweight.store.artifact import describe_files, merkle_digest
from featherweight.text.documents import Document, write_documents
from featherweight.text.spec import GateSpec
from featherweight.training.spec import FinetuneSpec, TrainSpec
from tasks.stages import stage_named


def digests(text: Path, root: Path) -> dict[str, str]:
    """The digest of each stage's output, by a label."""
    found: dict[str, str] = {}

    def run(name: str, label: str, spec: Any, **inputs: Path) -> Path:
        out = root / label
        out.mkdir(parents=True)
        stage_named(name)(spec, out=out, seed=3, **inputs)
        found[label] = merkle_digest(describe_files(out))
        return out

    steps = {"steps": 3, "batch": 2, "sequence": 16}
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "context": 64}
    model = run("train", "train", TrainSpec(**sizes, steps=3, batch=2), text=text)
    write_documents(root / "other", [Document("other", "Nobody in the village had ever seen so much rain fall in one evening.")])
    run("gate", "gate", GateSpec(), calibration=text, evaluation=root / "other")
    written = run("generate", "generate", GenerateSpec(samples=4, sequence=24, temperature=1.0), checkpoint=model, text=text)
    taught = {"sequence_level": {"temperature": 1.0}, "hidden_weight": 1}
    taught = DistillSpec(**steps | {"sequence": 24}, layers=1, **taught)
    model = run("distill", "distill", taught, checkpoint=model, text=text, generated=written)
    sparse = PruneSpec.of(method="sparse", criterion="sparsegpt", samples=4, sequence=16)
    sparse = run("prune", "sparse", sparse, checkpoint=model, calibration=text)
    run("finetune", "finetune", FinetuneSpec(**steps, lora={"rank": 2, "dropout": 0.1}), checkpoint=sparse, text=text)
    model = run(
        "prune", "prune", PruneSpec.of(ratio=0.5, attention=False, samples=4, sequence=16), checkpoint=model, calibration=text
    )
    few = {"samples": 8, "sequence": 16}
    for method, training in (("gptq", {}), ("qat", {"generated_tokens": 32, "steps": 3, "batch": 2})):
        spec = QuantizeSpec.of(method=method, grid="int8", **training, **few)
        quantized = run("quantize", method, spec, checkpoint=model, text=text, calibration=text)
    mixed = QuantizeSpec.of(grid="int4-g32", head=None, mixed={"budget": 10.0, "samples": 2}, **few)
    scan = run("sensitivity", "sensitivity", mixed.sensitivity, checkpoint=model, calibration=text)
    mixed = run("quantize", "mixed", mixed, checkpoint=model, text=text, calibration=text, sensitivity=scan)
    run("export", "torchao", ExportSpec.of(engine="torchao-int4"), checkpoint=mixed, calibration=text)
    run("export", "static", ExportSpec.of(engine="torch-static"), checkpoint=quantized, calibration=text)
    run("export", "half", ExportSpec.of(engine="torch", compute_type="bfloat16"), checkpoint=model, calibration=text)
    genai = CompileSpec.of(engine="onnxruntime-genai", precision="int8")
    run("compile", "genai", genai, checkpoint=quantized, calibration=text)
    run("export", "ctranslate2", ExportSpec.of(engine="ctranslate2", compute_type="int8"), checkpoint=quantized, calibration=text)
    return found


if __name__ == "__main__":
    print(json.dumps(digests(Path(sys.argv[1]), Path(sys.argv[2]))))
