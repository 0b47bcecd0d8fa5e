"""StoredParameter: a tensor of a format, among the parameters of its layer and never trained."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


class StoredParameter(nn.Parameter):
    """A Parameter without gradient, whatever asks for one; to the ops a plain tensor.

    As a buffer DistributedDataParallel would send it before each forward pass and FSDP2 would leave
    it whole. As a Parameter that is not trained neither sends it in a step, FSDP2 and distributed
    checkpoints shard it, and optimisers leave it out. ``requires_grad_`` and ``requires_grad = ..``
    do nothing, so that ``model.requires_grad_(True)`` trains the rest of a model.

    In a `state_dict` it is a plain tensor, in a pickle a plain Parameter: a file needs no class of
    this package, and the layer makes its own again.

    Args:
        data: any tensor. Of a subclass (DTensor, FakeTensor) a plain Parameter is made of it, as
            `nn.Parameter` does: it has its own class.
        requires_grad: ignored; hosts that copy a Parameter give it.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Any:
        plain = Tensor.detach(data)
        if type(plain) is not Tensor:
            return nn.Parameter(plain, requires_grad=False)
        made = Tensor._make_subclass(cls, plain, False)
        made.plain = plain
        return made

    plain: Tensor
    """The same memory as an exact tensor: a call hands this to its op, since the dispatcher asks
    each subclass for its ``__torch_function__`` (0.5 us a tensor)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "requires_grad":  # no property: each recorded call reads it
            super().__setattr__(name, value)
        if name == "data":
            self.plain = Tensor.detach(self)

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        super().set_(*args, **kwargs)
        self.plain = Tensor.detach(self)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(Tensor.detach(self), requires_grad=False).__reduce_ex__(protocol)

    def requires_grad_(self, requires_grad: bool = True) -> StoredParameter:
        return self

    def detach(self) -> Any:  # type: ignore[override]
        # of the same class, or nn.Parameter(parameter) raises
        return type(self)(self)

    def copy_(self, other: Tensor, non_blocking: bool = False) -> Tensor:
        # The moving average of equal codes is not theirs in floats: 6.9999995 is 7, torch makes 6.
        if other.is_floating_point() and not self.is_floating_point():
            other = other.round()
        return super().copy_(other, non_blocking)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            # nn.Parameter would clone: tensors that share memory would not do so in the copy
            memo[id(self)] = type(self)(copy.deepcopy(Tensor.detach(self), memo))
        return memo[id(self)]


def stored_in(tensor: Tensor) -> Tensor | None:
    """The plain tensor of a `StoredParameter`, which nobody writes; None of any other tensor."""
    return tensor.plain if isinstance(tensor, StoredParameter) else None
