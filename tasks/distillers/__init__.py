"""The parts of the distill stage: what it minimises, what it reads of the teacher, and the students it makes."""
