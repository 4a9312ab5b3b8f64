"""Parametrizations of a weight: from free parameters to orthogonal kernels."""
