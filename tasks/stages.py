"""Which stage is which function: one line per stage."""

from __future__ import annotations

from importlib import import_module

from tasks.stage import Stage

STAGES = {
    "text": "tasks.text:text",
    "gate": "tasks.gate:gate",
    "train": "tasks.train:train",
    "load": "tasks.load:load",
    "generate": "tasks.generate:generate",
    "distill": "tasks.distill:distill",
    "prune": "tasks.prune:prune",
    "finetune": "tasks.finetune:finetune",
    "sensitivity": "tasks.sensitivity:sensitivity",
    "quantize": "tasks.quantize:quantize",
    "compile": "tasks.compile:compile",
    "export": "tasks.export:export",
    "evaluate": "tasks.evaluate:evaluate",
    "decide": "tasks.decide:decide",
    "register": "tasks.register:register",
    "promote": "tasks.promote:promote",
}


def stage_named(name: str) -> Stage:
    """The stage of that name; its module is imported here."""
    module, _, attribute = STAGES[name].partition(":")
    return getattr(import_module(module), attribute)
