"""Runtimes: the engines that serve variants, each measured in a process of its own."""

from featherweight.runtimes.client import Worker, open_worker
from featherweight.runtimes.engine import Limits, Timing
from featherweight.runtimes.registry import ENGINES, engine_available, engine_class

__all__ = ["ENGINES", "Limits", "Timing", "Worker", "engine_available", "engine_class", "open_worker"]
