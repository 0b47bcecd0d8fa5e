"""Training aids that leave the loop to the caller: mixed precision and checkpoints."""

from bigops.train.checkpoint import load_checkpoint, save_checkpoint
from bigops.train.precision import PRECISIONS, MixedPrecision

__all__ = ["PRECISIONS", "MixedPrecision", "load_checkpoint", "save_checkpoint"]
