"""Distillation: what a student minimises, what it reads of the teacher, and the students themselves."""
