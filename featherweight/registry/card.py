"""The model card of a registered version: Markdown with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from featherweight.registry.lineage import Lineage, LineageGraph, facts, tree_lines

CARD = """---
{data}
---

# {name}

{variant} on {engine}: made by Featherweight from {base}, measured on the engine that serves it.

## Figures

| figure | value | 95 % confidence interval |
|---|---|---|
{figures}

## Where it comes from

{facts}

```
{tree}
```

## Recipe

```yaml
{recipe}
```
"""


def model_card(told: Lineage, licence: str = "") -> str:
    """The card's text. licence: an identifier of the hub's, such as 'apache-2.0'; a lineage does not know it."""
    from huggingface_hub import ModelCard, ModelCardData

    graph, root = told.graph, told.graph.checkpoint
    base = (root.source or "weights trained here") if root else "unknown weights"
    data = ModelCardData(
        license=licence or None,
        library_name="featherweight",
        pipeline_tag=_recipe(graph).get("task", "text-generation"),
        base_model=base if root and root.source else None,
        datasets=[node.source or node.id for node in graph.nodes if node.stage == "text"] or None,
        tags=["featherweight", told.engine],
        model_name=told.model,
        eval_results=list(_results(graph)) or None,
    )
    text = CARD.format(
        data=data.to_yaml(),
        name=f"{told.model} {told.version}",
        variant=graph.variant,
        engine=told.engine,
        base=base,
        figures="\n".join(_rows(graph.metrics)),
        facts="\n".join(f"- {name}: {value}" for name, value in facts(told).items()),
        tree="\n".join(tree_lines(graph)),
        recipe=graph.recipe.strip(),
    )
    return str(ModelCard(text, ignore_metadata_errors=False))


def _recipe(graph: LineageGraph) -> Mapping[str, Any]:
    return graph.recipe_tree


def _rows(metrics: Mapping[str, float]) -> Iterator[str]:
    """A row for each figure that bounds no other."""
    for name, value in sorted(metrics.items()):
        if name.removesuffix("_low").removesuffix("_high") == name:
            low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
            yield f"| {name} | {value:.6g} | {f'{low:.6g} to {high:.6g}' if low is not None and high is not None else ''} |"


def _results(graph: LineageGraph) -> Iterator[Any]:
    """The quality of the variant on its evaluation text, as the hub's table of results wants it."""
    from huggingface_hub import EvalResult

    text = next((node for node in reversed(graph.nodes) if node.stage == "text"), None)
    for name in ("bits_per_byte", "perplexity", "quality_change", "accuracy"):
        if text and name in graph.metrics:
            task = str(_recipe(graph).get("task", "text-generation"))
            dataset = text.source or text.id
            yield EvalResult(task, dataset, text.id, name, graph.metrics[name], dataset_revision=text.digest)
