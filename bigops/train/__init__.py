"""Training aids that leave the loop to the caller: precision, optimisers, checkpoints."""

from bigops.optim import SGD, AdamW, BatchSampler, load_checkpoint, save_checkpoint
from bigops.train.precision import PRECISIONS, MixedPrecision, StepResult

__all__ = [
    "PRECISIONS",
    "SGD",
    "AdamW",
    "BatchSampler",
    "MixedPrecision",
    "StepResult",
    "load_checkpoint",
    "save_checkpoint",
]
