"""Training aids that leave the loop to the caller: precision, optimisers, checkpoints."""

from bigops.graph.adapter_files import load_adapter_, save_adapter
from bigops.optim import (
    EMA,
    SGD,
    Adam,
    AdamW,
    Sampler,
    TrainState,
    load_checkpoint,
    save_checkpoint,
    step_in_backward,
)
from bigops.train import amp
from bigops.train.chunked_loss import chunked_loss_
from bigops.train.memory import CheckpointReport, checkpoint_
from bigops.train.precision import PRECISIONS, MixedPrecision, StepResult

__all__ = [
    "EMA",
    "PRECISIONS",
    "SGD",
    "Adam",
    "AdamW",
    "CheckpointReport",
    "MixedPrecision",
    "Sampler",
    "StepResult",
    "TrainState",
    "amp",
    "checkpoint_",
    "chunked_loss_",
    "load_adapter_",
    "load_checkpoint",
    "save_adapter",
    "save_checkpoint",
    "step_in_backward",
]
