"""Runtimes: the engines that serve variants, each measured in a process of its own."""

from featherweight.runtimes.catalog import ENGINES, engine_available, engine_class
from featherweight.runtimes.client import Worker, open_worker
from featherweight.runtimes.interface import Limits, Timing

__all__ = ["ENGINES", "Limits", "Timing", "Worker", "engine_available", "engine_class", "open_worker"]
