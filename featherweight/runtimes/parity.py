"""Parity: does the served engine compute what the PyTorch model computes? An export that does not fails its variant.

How the bounds were found: log-probabilities in nats of 6 windows of up to 128 tokens, engine against float32 PyTorch with the
same weights, on random Llama, Mistral (heads pruned), Qwen2 and GPT-2 models of 2 layers, stories260K and stories15M.

    activations                                       max |difference|   mean          bound
    float: CTranslate2, GenAI, either on int8/int4        0.00006        0.000006      max 0.001
    int8: GenAI (per block)                               0.42           0.032         mean 0.15
    int8: CTranslate2 (per token), VNNI or 7-bit grid     0.81           0.071         mean 0.15
    int8: vLLM W8A8 (per token)                           0.87           0.065         mean 0.15
    int8: torch-dynamic, torchao (per token), VNNI        0.63           0.059         mean 0.15
    int8: torch-static, against the same rounding         0.91           0.058         mean 0.15
    fp8: vLLM (per token)                                 0.92           0.060         mean 0.15
    fp8 keys and values: vLLM                             0.18           0.034         mean 0.15
    float16, on 4-bit weights: vLLM                       0.022          0.0019        max 0.1
    float16: PyTorch, vLLM                                0.025         0.0026         max 0.1
    bfloat16: PyTorch, vLLM                               0.26          0.019          mean 0.05
    int8: CTranslate2 on AVX2 without VNNI, 8-bit grid    3.6            0.21          mean 0.4
    (one matrix of the model with its scales doubled)     0.6 to 5.2     0.085 to 0.6
    (one row of one matrix with its scale doubled)        0.03 to 1.4    0.005 to 0.05

A static engine (one range per layer) is compared with a model that rounds its activations by the same ranges: what the rounding
itself costs, 0.29 on average on stories15M, is a matter of quality and not of parity.

What int8 activations hide, a wrong row say, the exact bound finds: compile and export hold the packed weights to it too, in a twin
of what is served that computes with float activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from featherweight.errors import ParityError
from featherweight.model.architecture import auto_class
from featherweight.progress import Metrics, Progress
from featherweight.runtimes import open_worker
from featherweight.store.served_folder import Serving
from featherweight.system.machine import INT8_DOT, cpu_features
from featherweight.text.model_inputs import IGNORED, scoring_windows, window_inputs
from featherweight.text.tokens import Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOWS = 6
WINDOW_TOKENS = 128


@dataclass(frozen=True)
class Bound:
    """The largest difference of log-probabilities, in nats, that rounding explains: of any token (max), or on average."""

    statistic: Literal["max", "mean"]
    value: float


EXACT = Bound("max", 1e-3)
"""Float activations: only the order of float32 additions differs."""
HALF = Bound("max", 0.1)
"""Float16 throughout, embedding and head included."""
BRAIN = Bound("mean", 0.05)
"""Bfloat16 throughout, 8 bits of mantissa: single tokens may move, the average hardly."""
SIXTEEN_BITS = {"float16": HALF, "bfloat16": BRAIN}
FP8 = Bound("mean", 0.15)
"""Activations, or keys and values, rounded to 8-bit floats (e4m3) at run time."""
INT8_ACTIVATIONS = Bound("mean", 0.15)
"""Activations rounded to int8 at run time: single tokens may move far, the average may not."""
SATURATING = Bound("mean", 0.4)
"""The same on a CPU without VNNI, where CTranslate2 adds pairs of 8-bit products in int16 and cuts off what does not fit."""


@dataclass(frozen=True)
class Reference:
    """Windows of calibration text and what the PyTorch model says about them: log-probabilities of what is scored in each."""

    windows: list[Window]
    logprobs: list[list[float]]

    @classmethod
    def of(cls, model: PreTrainedModel, source: Path, text: Path) -> Reference:
        """Score a few windows of `text` with `model`, float32 on the CPU; `source` has the tokenizer."""
        length = min(WINDOW_TOKENS, getattr(model.config, "max_position_embeddings", None) or WINDOW_TOKENS)
        windows = scoring_windows(source, model.config, text, length, WINDOWS)
        return cls(windows, [_score(model, window) for window in windows])

    def check(self, served: Path, bound: Bound | None = None) -> Metrics:
        """Compare with the engine that `served` names, started for it.

        bound: by default what the engine's handling of activations allows. Returns `parity_max_abs`, `parity_mean_abs` and
        `parity_bound`, in nats. Raises ParityError above the bound, and for anything that is not a number.
        """
        serving = Serving.read(served)
        longest = max(max(len(window.ids), len(window.source)) for window in self.windows)
        with open_worker(served, threads=1, max_tokens=longest, max_batch=1) as worker:
            found = worker.score(self.windows)
        return self.hold(found, bound or bound_of(serving), f"{serving.engine} ({serving.grid or 'float'})")

    def hold(self, found: list[list[float]], bound: Bound, name: str) -> Metrics:
        """The same for log-probabilities that `name` has computed already."""
        pairs = zip(self.logprobs, found, strict=True)
        differences = [abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)]
        values = {"max": max(differences), "mean": sum(differences) / len(differences)}
        # A NaN is above any bound, but no comparison says so.
        if not all(difference >= 0 for difference in differences) or not values[bound.statistic] <= bound.value:
            raise ParityError(
                f"{name} does not compute what its PyTorch source computes: "
                f"{bound.statistic} |difference| of log-probabilities {values[bound.statistic]:.4g} nats over "
                f"{len(differences)} tokens, bound {bound.value:g} (max {values['max']:.4g}, mean {values['mean']:.4g})"
            )
        return {"parity_max_abs": values["max"], "parity_mean_abs": values["mean"], "parity_bound": bound.value}


def check_parity(source: Path, served: Path, text: Path, progress: Progress = Progress()) -> Metrics:
    """Compare the engine that `served` names with the checkpoint in `source`, on windows of `text`; see Reference.check."""
    reference = Reference.of(load_reference(source), source, text)
    progress.note(f"comparing {Serving.read(served).engine} with PyTorch")
    return reference.check(served)


def load_reference(source: Path) -> PreTrainedModel:
    """The checkpoint's model, float32, on the CPU."""
    import torch
    from transformers import AutoConfig

    kind = auto_class(AutoConfig.from_pretrained(source, local_files_only=True))
    return kind.from_pretrained(source, dtype=torch.float32, local_files_only=True, use_safetensors=True).eval()


def bound_of(serving: Serving) -> Bound:
    """The bound that an engine is held to, by how it handles activations."""
    if serving.engine == "ctranslate2" and serving.options.get("compute_type") == "int8_float16":
        return INT8_ACTIVATIONS
    if serving.engine == "ctranslate2" and serving.options.get("compute_type") == "int8":
        exact_sums = serving.grid == "int8-reduced" or INT8_DOT & cpu_features()
        return INT8_ACTIVATIONS if exact_sums else SATURATING
    if serving.engine == "onnxruntime-genai" and serving.grid is not None:
        return INT8_ACTIVATIONS
    if serving.engine in ("torch-dynamic", "torch-static", "torchao-int8-dynamic"):
        return INT8_ACTIVATIONS
    if serving.engine == "vllm":
        return _vllm_bound(serving)
    return SIXTEEN_BITS.get(serving.options.get("dtype") or serving.options.get("compute_type", ""), EXACT)


def _vllm_bound(serving: Serving) -> Bound:
    """The loosest of what rounded activations, 16 bits and a rounded cache each explain."""
    bounds = [EXACT]
    if serving.grid is not None:
        bounds.append({"fp8": FP8, "int8": INT8_ACTIVATIONS}.get(serving.options.get("compute_type", "int8"), EXACT))
    bounds.append(SIXTEEN_BITS.get(serving.options.get("dtype", ""), EXACT))
    if serving.options.get("kv_cache_dtype") == "fp8":
        bounds.append(FP8)
    return max(bounds, key=lambda bound: (bound.statistic == "mean", bound.value))


def _score(model: PreTrainedModel, window: Window) -> list[float]:
    import torch

    with torch.inference_mode():
        inputs, labels = window_inputs(model.config, torch.tensor([window.ids]), torch.tensor([window.source]))
        wanted = labels[0] != IGNORED
        logits = model(**inputs).logits[0, wanted].log_softmax(-1)
        return logits.gather(-1, labels[0, wanted, None]).squeeze(-1).tolist()
