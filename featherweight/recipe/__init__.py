"""The recipe, its plan, what is ruled out before anything runs, and what a plan will cost."""
