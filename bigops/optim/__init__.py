"""Optimisers, sampler and run state, which training and compression share."""

from bigops.optim.checkpoint import TrainState, load_checkpoint, save_checkpoint
from bigops.optim.ema import EMA
from bigops.optim.in_backward import step_in_backward
from bigops.optim.optimizers import SGD, Adam, AdamW
from bigops.optim.sampler import Sampler

__all__ = [
    "EMA",
    "SGD",
    "Adam",
    "AdamW",
    "Sampler",
    "TrainState",
    "load_checkpoint",
    "save_checkpoint",
    "step_in_backward",
]
