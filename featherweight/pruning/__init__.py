"""Pruning: a file a method."""
