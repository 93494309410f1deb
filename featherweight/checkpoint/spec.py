"""What a recipe says of a checkpoint that is there already."""

from __future__ import annotations

from featherweight.spec import Spec, Task


class LoadSpec(Spec):
    """Where a checkpoint comes from, how far it is trusted, and the task that its architecture must be made for."""

    source: str
    allow_pickle: bool = False
    trust_remote_code: bool = False
    task: Task = "text-generation"
