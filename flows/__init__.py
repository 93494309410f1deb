"""Sentences: Prefect flows that chain the verbs, and the command line."""
