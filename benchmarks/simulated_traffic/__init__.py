"""Counts of our CUDA kernels in the CUDA simulator: the shapes, the counting, what must hold, the tables."""
