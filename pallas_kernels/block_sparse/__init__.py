"""Chosen blocks as data: the set of each query, and the lists that kernels read, made of it."""
