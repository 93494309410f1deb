"""How a node of the plan ended: the one thing that running a node returns and that everything after it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from featherweight.errors import ToolchainError, told
from featherweight.recipe.nodes import Node
from featherweight.store.artifact import ArtifactRef

Status = Literal["done", "cached", "failed", "skipped", "blocked", "passed-over"]
PASSED_OVER: Status = "passed-over"
"""Of what a search did not come to."""


@dataclass(frozen=True)
class Outcome:
    """A node's id and how it ended: 'skipped' where its toolchain is not here, 'blocked' where an input is missing.

    returned: the reference to its artifact, the very object that Prefect returned, by which Prefect draws the edges of its graph.
    """

    node: str
    status: Status
    returned: Mapping[str, Any] | None = None
    error: Exception | None = None

    @classmethod
    def failure(cls, node: str, error: Exception) -> Self:
        """The outcome of a node that raised."""
        return cls(node, "skipped" if isinstance(error, ToolchainError) else "failed", error=error)

    @property
    def ref(self) -> ArtifactRef | None:
        """The artifact, None where there is none."""
        return None if self.returned is None else ArtifactRef.model_validate(self.returned)

    @property
    def artifact(self) -> ArtifactRef:
        """The artifact of a node that must have one; raises what the node raised where it has none."""
        found = self.ref
        if found is None:
            raise self.error or LookupError(f"{self.node} has no artifact")
        return found

    @property
    def cached(self) -> bool:
        """Whether the artifact was there before."""
        return self.status == "cached"

    @property
    def reason(self) -> str:
        """Why there is no artifact, in one line."""
        return told(self.error) if self.error else ""

    @property
    def kind(self) -> str:
        """The kind of error, such as 'DivergenceError'."""
        return type(self.error).__name__ if self.error else ""


Outcomes = Mapping[str, Outcome]


def blocked(node: Node, outcomes: Outcomes) -> Outcome | None:
    """The outcome of a node that cannot run because an input is not there, for that input's reason; None where all are."""
    for origin in node.inputs.values():
        lacking = outcomes[origin]
        if lacking.returned is None:
            return Outcome(node.id, "skipped" if lacking.status == "skipped" else "blocked", error=lacking.error)
    return None
