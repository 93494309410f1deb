"""Searching among a recipe's variants within a budget of time."""
