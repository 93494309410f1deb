"""Nouns: what things are (recipes, plans, artifacts, grids, runtimes, measurements, the registry)."""

from featherweight.system import lighter_imports

__version__ = "0.1.0"

lighter_imports.install()
