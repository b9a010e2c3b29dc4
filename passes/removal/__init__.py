"""Structured removal: truly smaller dense programs."""

from graphwright.passes.removal.passes import RemoveChannels, RemoveHeads, RemoveHiddenDims

__all__ = ["RemoveChannels", "RemoveHeads", "RemoveHiddenDims"]
