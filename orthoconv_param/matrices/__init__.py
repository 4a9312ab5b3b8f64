"""Skew-Hermitian and unitary matrices: the exponential and its derivative, other maps, decompositions."""
