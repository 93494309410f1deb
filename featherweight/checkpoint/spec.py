"""What a recipe says of a checkpoint that is there already."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from featherweight.spec import Name, Spec, Task

OfAdapter = Literal["merge", "ignore"]


class LoadSpec(Spec):
    """Where a checkpoint comes from, how far it is trusted, and the task that its architecture must be made for.

    base: where an adapter's base model comes from, instead of from where the adapter says.
    adapter: whether an adapter that lies beside full weights is merged into them or left out.
    adapters: LoRA folders that are kept beside the checkpoint under these names, not merged.
    """

    source: str
    allow_pickle: bool = False
    trust_remote_code: bool = False
    base: str | None = None
    adapter: OfAdapter | None = None
    adapters: dict[Name, str] = Field(default_factory=dict)
    task: Task = "text-generation"
