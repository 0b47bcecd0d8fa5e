"""Optimisers and their state, which training and compression share."""

from bigops.optim.optimizers import SGD, AdamW

__all__ = ["SGD", "AdamW"]
