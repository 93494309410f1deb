"""Advice: which engine and which grid suit a model, a machine and a workload, before anything is made."""
