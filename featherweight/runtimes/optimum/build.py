"""Optimum's exporter and its optimizer for ONNX Runtime: a checkpoint in, graphs out.

It is run by the toolchain's Python, which knows nothing of Featherweight: nothing but Optimum and what it brings is imported here.
Each line that it says is JSON: {"note": ...} of what begins, and at the end {"graphs": [...]} or {"error": ...}.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Say = Callable[..., None]
SEQ2SEQ = ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")
CLASSES = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "text-generation-with-past": "AutoModelForCausalLM",
    "text2text-generation-with-past": "AutoModelForSeq2SeqLM",
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", required=True, choices=sorted(CLASSES))
    parser.add_argument("--optimize", choices=("O1", "O2", "O3", "O4"))
    parser.add_argument("--keep-matrices", action="store_true", help="fuse no products")
    options = parser.parse_args()
    say = speaker()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        export(options.checkpoint, options.out, options.task, say)
        if options.optimize:
            optimize(options.out, options.optimize, say, keep_matrices=options.keep_matrices)
    except Exception as error:
        say(error=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        return 1
    say(graphs=graphs(options.out))
    return 0


def speaker() -> Say:
    """Says things on standard output, which from now on libraries are kept from: what they print goes to standard error."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**told: object) -> None:
        print(json.dumps(told), file=stream, flush=True)

    return say


def export(checkpoint: Path, out: Path, task: str, say: Say) -> None:
    """Write the graphs of a checkpoint to `out`, float32: one, or those of an encoder and its decoder with and without past."""
    from optimum.exporters.onnx import onnx_export_from_model

    say(note="loading the checkpoint")
    model = load(checkpoint, task)
    say(note="tracing the graphs")
    # A merged decoder could not be optimized; validation is the parity gate's, on the served length.
    onnx_export_from_model(model, out, task=task, no_post_process=True, do_validation=False)


def load(checkpoint: Path, task: str) -> Any:
    """The model in float32; raises KeyError where this transformers misses a weight that is not another one's name."""
    import torch
    import transformers

    kind = getattr(transformers, CLASSES[task])
    model, told = kind.from_pretrained(checkpoint, local_files_only=True, dtype=torch.float32, output_loading_info=True)
    missing = [name for name in told["missing_keys"] if "pooler" not in name]
    if missing == ["lm_head.weight"] and hasattr(model, "shared"):
        model.lm_head.weight, missing = model.shared.weight, []  # tied all the same where logits are not scaled (see mends)
    if lost := missing or told["mismatched_keys"]:
        raise KeyError(f"transformers {transformers.__version__} does not find {lost} in the checkpoint")
    return model.eval()


def optimize(out: Path, level: str, say: Say, *, keep_matrices: bool) -> None:
    """ONNX Runtime's own fusions by Optimum's level, in place."""
    from optimum.onnxruntime import AutoOptimizationConfig, ORTOptimizer

    config = AutoOptimizationConfig.with_optimization_level(level)
    config.disable_attention_fusion = config.disable_embed_layer_norm_fusion = keep_matrices
    for name in graphs(out):
        say(note=f"fusing {name}, {level}")
        ORTOptimizer.from_pretrained(out, file_names=[name]).optimize(config, out, file_suffix="")


def graphs(folder: Path) -> list[str]:
    """The graphs in a folder, in the order in which they are run."""
    return [name for name in ("model.onnx", *SEQ2SEQ) if (folder / name).is_file()]


if __name__ == "__main__":
    sys.exit(main())
