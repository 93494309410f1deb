"""Verbs: one room per stage. A stage is a pure function of files and a spec; `@stage` gives it everything else."""
