"""Training aids that leave the loop to the caller: precision, optimisers, checkpoints."""

from bigops.optim.checkpoint import load_checkpoint, save_checkpoint
from bigops.optim.optimizers import SGD, AdamW
from bigops.train.precision import PRECISIONS, MixedPrecision

__all__ = [
    "PRECISIONS",
    "SGD",
    "AdamW",
    "MixedPrecision",
    "load_checkpoint",
    "save_checkpoint",
]
