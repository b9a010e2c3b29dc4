"""Sparsity: weights that are zero, and storing them so that they cost nothing."""
