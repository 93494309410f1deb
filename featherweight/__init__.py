"""Nouns: what things are (recipes, plans, artifacts, grids, runtimes, measurements, the registry)."""

__version__ = "0.1.0"
