"""Training aids that leave the loop to the caller: precision, optimisers, checkpoints."""

from bigops.optim import SGD, AdamW, Sampler, TrainState, load_checkpoint, save_checkpoint
from bigops.train import amp
from bigops.train.precision import PRECISIONS, MixedPrecision, StepResult

__all__ = [
    "PRECISIONS",
    "SGD",
    "AdamW",
    "MixedPrecision",
    "Sampler",
    "StepResult",
    "TrainState",
    "amp",
    "load_checkpoint",
    "save_checkpoint",
]
