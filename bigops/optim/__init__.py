"""Optimisers, sampler and run state, which training and compression share."""

from bigops.optim.checkpoint import load_checkpoint, save_checkpoint
from bigops.optim.optimizers import SGD, AdamW
from bigops.optim.sampler import BatchSampler

__all__ = ["SGD", "AdamW", "BatchSampler", "load_checkpoint", "save_checkpoint"]
