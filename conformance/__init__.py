"""Every family that transformers opens, in tiny, through every engine: what is exact, what is bounded, what is refused."""
