"""A model made ready to run by one provider."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from bigops.benches.models.subject import Call, Subject


@dataclass(frozen=True)
class Side:
    """One provider of a model.

    ``isa`` is the instruction set that it may use at most, or used where it tells. ``nbytes`` are
    those of its weights. ``reference`` is the float32 twin that it is held against, where that is
    not the model itself, such as of a pruned one. ``module`` is a torch module whose operators the
    profiler sees.
    """

    provider: str
    call: Call
    isa: str
    nbytes: int | None
    own_pool: bool = False  # runs threads that are not torch's
    reference: nn.Module | None = None
    module: nn.Module | None = None


Make = Callable[[Subject], Side]  # raises LeftOut


def nbytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, those that share memory counted once."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def inference(model: Call) -> Call:
    """The model without autograd's bookkeeping."""

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(*inputs)

    return call


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what converters say about themselves off the screen, and off stdout what remains."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "root")]
    levels = [logger.level for logger in loggers]
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
