"""What every cell imports, imported once, before the processes of the cells part: see run.PRELOADED."""

import tasks.load
import tasks.quantize  # noqa: F401
from conformance import cell, families

families.families()  # asks transformers and the engines' libraries, which imports most of them

__all__ = ["cell"]
