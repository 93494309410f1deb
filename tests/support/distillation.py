"""What the tests of distillation share."""

from __future__ import annotations

from featherweight.distillation.spec import DistillSpec

SPEC = DistillSpec(layers=1, steps=3, batch=4, sequence=24, learning_rate=1e-3)
