"""Training: the loop, its state, adapters, and several processes."""
