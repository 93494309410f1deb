"""Where things lie: the repository, what tests share, and what is shared beside a checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
TINY_RECIPE = SUPPORT / "tiny.yaml"
SHARED = ROOT.parent / "shared"
"""Models and texts that lie beside a checkout; tests that want them are skipped where they do not."""
