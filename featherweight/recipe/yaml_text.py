"""YAML as a recipe needs it: no key twice, no deep nesting, nothing that grows when it is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

LONGEST = 1_000_000
LARGEST = 100_000
DEEPEST = 50


class _OnceEach(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys, and drops what the first one said without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key.value}' stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, or ValueError where it is too long or nested too deep, before it is read."""
    if len(text) > LONGEST:
        raise ValueError(f"{len(text)} characters; a recipe has at most {LONGEST}")
    _require_small(yaml.parse(text, Loader=yaml.SafeLoader))
    return yaml.load(text, Loader=_OnceEach)  # a SafeLoader


def _require_small(events: Iterator[yaml.Event]) -> None:
    """Count what the text holds once each alias (`*x`) is written out, from its events: nothing has been built by then."""
    sizes: dict[str, int] = {}
    open_ones: list[tuple[str | None, int]] = [(None, 0)]
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            open_ones.append((event.anchor, 1))
            if len(open_ones) > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} deep")
            continue
        anchor, size = None, 0
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_ones.pop()
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, LARGEST)
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        if anchor is not None:
            sizes[anchor] = size
        open_ones[-1] = (open_ones[-1][0], open_ones[-1][1] + size)
        if open_ones[-1][1] > LARGEST:
            raise ValueError(f"more than {LARGEST} values, its aliases written out")
