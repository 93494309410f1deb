"""The checkpoint that an engine is asked to serve, as far as it is known: in the plan, and when it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from featherweight.grid import Grid
from featherweight.model.facts import CheckpointFacts
from featherweight.model.positions import context_tokens
from featherweight.runtimes.generation_settings import GenerationSettings
from featherweight.spec import HEADED
from featherweight.system.device import CPU, Device

if TYPE_CHECKING:
    from featherweight.model.quantized_weights import QuantizedWeights
    from featherweight.runtimes.interface import Runtime
    from featherweight.runtimes.spec import ServingSpec


@dataclass(frozen=True)
class Candidate:
    """What `model_refusal` judges by. tokens: the longest sequence that is asked for.

    rows: grid and columns of each matrix in the blocks; empty where they are in float, or not known yet. device: where it is to be
    served.
    """

    facts: CheckpointFacts
    tokens: int
    rows: Mapping[str, tuple[Grid, int]] = field(default_factory=dict)
    device: Device = CPU

    @property
    def config(self) -> Any:
        """The model's configuration, as transformers has it."""
        return self.facts.config

    @property
    def max_tokens(self) -> int:
        """The longest sequence that is served: what is asked for, within the model's context."""
        return served_tokens(self.config, self.tokens)

    def refusal(self, runtime: Runtime[Any], spec: ServingSpec) -> str | None:
        """Why the engine does not serve it, in one line: the model itself, or how its texts are to be written."""
        if reason := runtime.model_refusal(spec, self):
            return reason
        if self.facts.generation is None or self.facts.task in HEADED:
            return None
        return GenerationSettings.of(self.facts.generation).refusal(runtime.loaded_model().follows, spec.engine)


def served_tokens(config: Any, tokens: int) -> int:
    """How many of `tokens` fit the model's context, of source and target where it has both."""
    return min(tokens, (2 if config.is_encoder_decoder else 1) * context_tokens(config))


def rows_of(quantized: QuantizedWeights | None) -> dict[str, tuple[Grid, int]]:
    """Grid and columns of each quantized matrix in the blocks."""
    return {name: (grid, int(quantized.q[name].shape[1])) for name, grid in quantized.body.items()} if quantized else {}
