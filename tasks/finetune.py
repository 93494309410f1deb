"""finetune: recovery training of all weights."""

from __future__ import annotations

from pathlib import Path

from featherweight import surgery, training
from featherweight.examples import example_blocks
from featherweight.progress import Progress
from featherweight.recipe import FinetuneSpec
from tasks.stage import Metrics, stage


@stage("finetune", version="1", libraries=("torch", "transformers"))
def finetune(
    spec: FinetuneSpec, *, checkpoint: Path, text: Path, out: Path, seed: int = 0, progress: Progress = Progress()
) -> Metrics:
    """Train every weight of `checkpoint` on `text`: AdamW, linear warm-up, cosine decay.

    Metrics: `loss_first` and `loss_last` (nats per token, means over the first and last tenth of the steps), `tokens`,
    `tokens_per_s`, `parameters`. Raises StageError on divergence, DataError where the text is too short.
    """
    config = surgery.load_config(checkpoint)
    surgery.require_context(config, spec.sequence, "finetune")
    blocks = example_blocks(checkpoint, config, text, spec.sequence, limit=spec.steps * spec.batch, seed=seed)
    model = surgery.load_model(checkpoint)
    run = training.timed_loop(
        model,
        blocks,
        steps=spec.steps,
        batch=spec.batch,
        learning_rate=spec.learning_rate,
        weight_decay=0.01,
        seed=seed,
        progress=progress,
    )
    surgery.save_model(model, out, checkpoint)
    return run | {"parameters": surgery.parameters(model)}
