"""Models in memory: where a transformer keeps its parts, and how they are cut, sparsified and put on a grid."""
