"""The place where models that were registered by earlier releases look for their generator."""

from featherweight.registry.generator import Generator

__all__ = ["Generator"]
