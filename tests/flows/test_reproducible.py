"""Same recipe, same machine, same digest: every stage that writes weights, run in two processes that hash in different orders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.text.documents import Document, write_documents

STAGES = """
import json, sys
from pathlib import Path
from featherweight.distillation.spec import DistillSpec, GenerateSpec
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.runtimes.spec import CompileSpec, ExportSpec
from featherweight.store.artifact import describe_files, merkle_digest
from featherweight.text.documents import Document, write_documents
from featherweight.text.spec import GateSpec
from featherweight.training.spec import FinetuneSpec, TrainSpec
from tasks.stages import stage_named

text, root = Path(sys.argv[1]), Path(sys.argv[2])
digests = {}

def run(name, label, spec, **inputs):
    out = root / label
    out.mkdir(parents=True)
    stage_named(name)(spec, out=out, seed=3, **inputs)
    digests[label] = merkle_digest(describe_files(out))
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
model = run("prune", "prune", PruneSpec.of(ratio=0.5, attention=False, samples=4, sequence=16), checkpoint=model, calibration=text)
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
print(json.dumps(digests))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    stories = [f"Number {number} of the stories: a fox, a wolf and a bear met at the river by night." for number in range(80)]
    write_documents(folder, [Document(str(place), story) for place, story in enumerate(stories)])
    return folder


def _digests(text: Path, root: Path, hash_seed: str) -> dict[str, str]:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STAGES, str(text), str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_stage_gives_the_same_digest_again(text: Path, tmp_path: Path) -> None:
    first, second = (_digests(text, tmp_path / seed, seed) for seed in ("1", "2"))
    assert first == second
    assert len(set(first.values())) == len(first) == 16
