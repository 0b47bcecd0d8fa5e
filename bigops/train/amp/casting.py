"""Casts of inputs, results and weights, and the state_dict that stays float32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import nullcontext
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Function = Callable[..., Any]
Masters = dict[Tensor, Tensor]
"""Parameter in 16 bits -> its float32 master."""


def cast(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with each floating tensor in it in ``dtype``.

    Goes through lists, tuples (named ones too) and mappings, which keep their type, and asks ``to``
    of other objects that have it, batches of the user's own. Arrays of numpy, modules, strings and
    everything else stay as they are.
    """
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, str | bytes | np.ndarray | np.generic | nn.Module):
        return value
    if isinstance(value, Mapping):
        if type(value) is dict or not isinstance(value, MutableMapping):
            return {key: cast(item, dtype) for key, item in value.items()}
        new = copy.copy(value)
        for key, item in value.items():
            new[key] = cast(item, dtype)
        return new
    if hasattr(value, "to") and not isinstance(value, type):
        return value.to(dtype)
    if isinstance(value, list | tuple):
        items = [cast(item, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def wrap_forward_(
    model: nn.Module,
    *,
    inputs: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    outputs: torch.dtype | None = None,
) -> None:
    """Let the model's ``forward`` cast what it takes and gives, and run under autocast.

    It becomes a bound method of this model, which `copy.deepcopy` binds to the copy.
    """
    held = model.__dict__.get("forward")

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if inputs is not None:
            args, kwargs = cast(args, inputs), cast(kwargs, inputs)
        kind = next((p.device.type for p in self.parameters()), "cpu")
        with nullcontext() if autocast is None else torch.autocast(kind, dtype=autocast):
            if held is None:
                result = type(self).forward(self, *args, **kwargs)
            elif isinstance(held, MethodType) and held.__self__ is model:
                result = held.__func__(self, *args, **kwargs)
            else:
                result = held(*args, **kwargs)
        return result if outputs is None else cast(result, outputs)

    model.forward = MethodType(forward, model)


def cast_model_(model: nn.Module, dtype: torch.dtype, keep_batchnorm_fp32: bool) -> None:
    """Cast floating parameters and buffers; parameters stay the same objects.

    With ``keep_batchnorm_fp32`` the batch norms that have a weight keep theirs.
    """

    def to(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine
        if not (norm and keep_batchnorm_fp32):
            module._apply(to, recurse=False)


def hold_state_(model: nn.Module, masters: Masters) -> None:
    """Let the model's state_dict be float32, and hold the masters where there are any."""
    for module in model.modules():
        module.register_state_dict_post_hook(_Give(masters))
        module.register_load_state_dict_pre_hook(_Take(masters))


class _Hook:
    """Of one module. A copy of it has no masters: its weights go ways of their own."""

    def __init__(self, masters: Masters) -> None:
        self.masters = masters

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)({})


class _Give(_Hook):
    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name, held in _own(module):
            value = state.get(prefix + name)
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                master = self.masters.get(held)
                # One that no longer rounds to its weight: somebody wrote the weight since.
                if master is not None and torch.equal(master.to(held.dtype), held):
                    state[prefix + name] = master.detach()
                else:
                    state[prefix + name] = value.float()


class _Take(_Hook):
    @torch.no_grad()
    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, held in _own(module):
            master, value = self.masters.get(held), state.get(prefix + name)
            if master is not None and isinstance(value, Tensor) and value.shape == master.shape:
                master.copy_(value)


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    both = [*module._parameters.items(), *module._buffers.items()]
    return [(name, held) for name, held in both if held is not None]


def widest(values: Any) -> torch.dtype | None:
    """The dtype that holds every floating tensor of the arguments of a call; None without one."""
    found: list[torch.dtype] = []

    def see(value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(value.dtype)
        elif isinstance(value, Mapping):
            see(list(value.values()))
        elif isinstance(value, list | tuple):
            for item in value:
                see(item)

    see(values)
    result = found[0] if found else None
    for dtype in found:
        result = torch.promote_types(result, dtype)  # type: ignore[arg-type]
    return result
