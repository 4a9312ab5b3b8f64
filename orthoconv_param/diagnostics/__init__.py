"""Singular values of convolutions: as numbers, as a table, as plots."""
