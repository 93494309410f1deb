"""Checkpoints: where they come from, which files they hold, what they must pass, how they are opened and saved."""
