"""A served variant: a folder that an engine can load, described by `serving.json` at its root."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from featherweight.errors import IntegrityError

FILE = "serving.json"


@dataclass(frozen=True)
class Serving:
    """Which engine serves the folder, and how.

    engine: a name of featherweight.runtimes.catalog.ENGINES.
    weights: sub-folder with the engine's own files ('.' for the root). The tokenizer's files lie at the root.
    options: what the engine must be told at load time, such as {"compute_type": "int8"}.
    grid: name of the grid that the weights lie on, None for float.
    """

    engine: str
    weights: str = "."
    options: dict[str, str] = field(default_factory=dict)
    grid: str | None = None

    def write(self, folder: Path) -> None:
        """Write `serving.json` into `folder`."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> Serving:
        """Read `folder/serving.json`; raises IntegrityError where there is none."""
        path = folder / FILE
        if not path.is_file():
            raise IntegrityError(f"{folder} is not a served variant: it has no {FILE}")
        return cls(**json.loads(path.read_text()))
