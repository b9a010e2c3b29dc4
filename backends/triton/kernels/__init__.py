"""Triton kernels, one file for each family; nothing here is imported before triton is wanted."""
