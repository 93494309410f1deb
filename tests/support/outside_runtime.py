"""A whole engine from outside the tree, in one file: transformers' own module without a cache, its weights stored in 16 bits.

Its distribution names it with an entry point, `[project.entry-points."featherweight.runtimes"] plain = "outside_runtime:PLAIN"`.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from featherweight.runtimes.bounds import Bound
from featherweight.runtimes.interface import Generation, Grids, LoadedModel, Runtime, Timing, Tokens
from featherweight.runtimes.spec import ExportSpec
from featherweight.spec import Task
from featherweight.store.served_folder import Serving

if TYPE_CHECKING:
    from featherweight.runtimes.writing import Source


class PlainSpec(ExportSpec):
    """attention: which of transformers' implementations computes it."""

    engine: Literal["plain"]
    attention: Literal["eager", "sdpa"] = "sdpa"


class Plain(Runtime[PlainSpec]):
    """Decoders: half the size on disk, float32 in memory."""

    name = "plain"
    spec = PlainSpec
    loads_with = "outside_runtime:PlainModel"
    modules = ("torch",)
    libraries = ("torch", "transformers", "outside-runtime")
    requirements = ("torch", "outside-runtime")
    writing_s, measuring_s = 1, 3

    def write(self, spec: PlainSpec, source: Source, out: Path) -> None:
        from featherweight.checkpoint.saving import save_model

        source.round_floats("float16")
        save_model(source.model, out, source.checkpoint)
        Serving(self.name, options={"attention": spec.attention}).write(out)

    def bound(self, serving: Serving) -> Bound:
        return Bound("max", 2e-5)

    def task_refusal(self, task: Task) -> str | None:
        return None if task == "text-generation" else "plain knows decoders only"

    def grid_refusal(self, grids: Grids, spec: PlainSpec) -> str | None:
        return f"plain computes in float32 and has no kernel for {grids.body.name}" if grids.body else None


class PlainModel(LoadedModel):
    """options: `attention`."""

    def load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(self.threads)
        how = {"attn_implementation": self.options["attention"], "dtype": torch.float32, "local_files_only": True}
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.weights, **how).eval()

    def _logits(self, ids: list[int]) -> Any:
        import torch

        with torch.inference_mode():
            return self.model(torch.tensor([ids]), use_cache=False).logits[0]

    def logprobs(self, windows: Tokens) -> list[list[float]]:
        scores = [self._logits(ids)[:-1].log_softmax(-1) for ids in windows]
        return [score[range(len(ids) - 1), ids[1:]].tolist() for score, ids in zip(scores, windows, strict=True)]

    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        texts, began, first = [list(prompt) for prompt in prompts], perf_counter(), 0.0
        for _ in range(new_tokens):
            for text in texts:
                text.append(int(self._logits(text)[-1].argmax()))
            first = first or perf_counter() - began
        new = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
        return Generation(new, Timing(first, perf_counter() - began))


PLAIN = Plain()
