"""What is shipped beside the code: recipes, and what installs the toolchains. In a checkout they lie in it, else in the package."""

from __future__ import annotations

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGED = Path(__file__).resolve().parents[1] / "shipped"


def in_checkout() -> bool:
    """Whether this code runs from a checkout, and not from an installed wheel."""
    return not PACKAGED.is_dir()


def shipped(name: str) -> Path:
    """A file or folder by its path in the repository, such as 'recipes/demo.yaml'."""
    return (CHECKOUT if in_checkout() else PACKAGED) / name


def environments() -> Path:
    """Where toolchains are installed by default: beside the code of a checkout, else in the environment that has the wheel."""
    return CHECKOUT / ".toolchains" if in_checkout() else Path(sys.prefix) / "share" / "featherweight" / "toolchains"
