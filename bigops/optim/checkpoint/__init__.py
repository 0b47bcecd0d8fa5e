"""The state of a run: written whole or not at all, loaded whole or not at all, without pickle."""

from bigops.optim.checkpoint.one_file import load_checkpoint, save_checkpoint
from bigops.optim.checkpoint.train_state import TrainState

__all__ = ["TrainState", "load_checkpoint", "save_checkpoint"]
