"""Forward mode: `torch.autograd.forward_ad`, torch.func.jvp and what stands on it.

The kernels carry no tangents. Where a level of forward mode is entered the ops run as expressions
of torch's own, which have tangents, gradients and batches of both, of every order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_JVP = torch._C._functorch.TransformType.Jvp


def is_active() -> bool:
    """Whether tensors may have tangents here: by torch.autograd.forward_ad or by torch.func.

    A graph that is lowered has entered the levels of torch.func without forward_ad's knowledge.
    """
    if forward_ad._current_level >= 0:
        return True
    stack = torch._C._functorch.get_interpreter_stack()
    return stack is not None and any(level.key() == _JVP for level in stack)


def has_tangent(t: Any) -> bool:
    """Whether t is a tensor with a tangent."""
    if not isinstance(t, Tensor) or not is_active():
        return False
    return forward_ad.unpack_dual(t, level=0).tangent is not None
