"""What every cell imports, imported once: see run.PRELOADED."""

import torchao  # noqa: F401

from conformance import cell

__all__ = ["cell"]
