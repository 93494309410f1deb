"""One request, and what it waited."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """Seconds since its round began: when it came, when its first token was there, when it was answered.

    None where that never came: it was given up.
    """

    came_s: float
    first_s: float | None
    answered_s: float | None

    @property
    def latency_s(self) -> float:
        """From its coming to its answer, the waiting included; infinite where there was none."""
        return math.inf if self.answered_s is None else self.answered_s - self.came_s

    @property
    def ttft_s(self) -> float:
        """From its coming to its first token; infinite where it was given up."""
        return math.inf if self.first_s is None or self.answered_s is None else self.first_s - self.came_s
