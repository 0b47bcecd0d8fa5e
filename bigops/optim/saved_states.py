"""How the states of `FusedOptimizer` stand in a state_dict, how they are checked and taken back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigops.ops.fused_adamw import states
from bigops.optim import placed

MIN_EIGHT_BIT = 4096
"""States of smaller tensors stay in 32 bits: they weigh nothing, and biases need the precision."""
MIN_ROW = 16
"""States of shorter rows, too, each with an absmax of 4 bytes: 3 x 3 depthwise kernels have 9."""


def wide(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's states in floats."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def coded(group: dict[str, Any], param: Tensor) -> bool:
    """Whether a parameter's states are in 8 bits: by its whole size, on every mesh the same.

    Of one dimension they are where it is no DTensor: its one row would be split between ranks.
    """
    if not group["eight_bit"] or param.dtype == torch.float64 or param.numel() < MIN_EIGHT_BIT:
        return False
    if param.ndim == 1 and placed.is_split(param):
        return False
    return states.row_of(param.shape, states.leading_of(param.shape)) >= MIN_ROW


def with_codes_apart(
    signed: Mapping[str, bool], _: Optimizer, given: dict[str, Any]
) -> dict[str, Any]:
    """A state_dict in which a moment in 8 bits is ``{"codes": uint8}``; its scales stay beside.

    Whether a buffer of SGD waits for its first gradient is left out: the file of a run that has
    stepped, which is read into such states, says nothing of it.
    """

    def form(held: dict[str, Any]) -> dict[str, Any]:
        held = {key: value for key, value in held.items() if key != "fresh"}
        coded = [name for name in signed if f"{name}_scale" in held]
        return held | {name: {"codes": held[name]} for name in coded} if coded else held

    return {**given, "state": {key: form(held) for key, held in given["state"].items()}}


def _moment(held: dict[str, Any], name: str) -> tuple[Any, Any]:
    """A moment and its scales, None where it is in floats; older files hold codes as they are."""
    value = held[name]
    return value.get("codes") if isinstance(value, dict) else value, held.get(f"{name}_scale")


def check(
    whose: str,
    held: dict[str, Any],
    param: Tensor,
    signed: Mapping[str, bool],
    whole: Sequence[str],
) -> None:
    """Raise ValueError or TypeError unless a saved state fits the parameter.

    Args:
        whose: words for the messages.
        signed: names of the moments.
        whole: what a state has all of, if any.
    """
    missing = [name for name in whole if held.get(name) is None]
    if missing and len(missing) < len(whole):
        raise ValueError(
            f"state_dict: state {whose}: expected {', '.join(whole)}; got "
            f"{', '.join(map(str, held))}"
        )
    step = held.get("step")
    if step is not None:
        one = not isinstance(step, Tensor) or step.numel() == 1
        if not (one and float(step) >= 0):
            raise ValueError(f"state_dict: step {whose}: expected a number from 0 on; got {step}")
    for name in (*signed, "master"):
        if held.get(name) is None:
            continue
        value, scales = _moment(held, name)
        where = f"state_dict: {name} {whose}: expected"
        if not isinstance(value, Tensor):
            raise TypeError(f"{where} a torch.Tensor; got {type(value).__name__}")
        if value.shape != param.shape:
            raise ValueError(f"{where} shape {list(param.shape)}; got {list(value.shape)}")
        if value.dtype == torch.uint8 and name in signed:
            if scales is None or not states.fits(scales, param.shape):
                got = "none" if scales is None else f"shape {list(scales.shape)}"
                want = list(states.scales_shape(param.shape))
                raise ValueError(f"{where} scales of shape {want}; got {got}")
        elif scales is not None:  # torch.optim leaves that of codes that it took for values
            raise TypeError(f"{where} codes of uint8 beside their scales; got {value.dtype}")
        elif not value.is_floating_point():
            raise TypeError(f"{where} a floating dtype; got {value.dtype}")


def fitted(
    group: dict[str, Any], param: Tensor, loaded: dict[str, Any], signed: Mapping[str, bool]
) -> dict[str, Any]:
    """A checked state as the optimiser keeps it for this group, in memory of its own."""
    own: dict[str, Any] = {}
    for name, value in loaded.items():
        if value is None or (name.removesuffix("_scale") in signed and name not in signed):
            continue
        if name == "step":
            own[name] = torch.tensor(float(value), dtype=torch.float32, device="cpu")
        elif name == "master":
            own[name] = torch.empty_like(param, dtype=torch.float32).copy_(
                placed.laid(value, param)
            )
        elif name in signed:
            moment, scales = _moment(loaded, name)
            if coded(group, param):
                own[name], own[f"{name}_scale"] = _codes(param, moment, scales, signed[name])
            else:
                if scales is not None:
                    moment = _floats(moment, scales, signed[name])
                own[name] = torch.empty_like(param, dtype=wide(param)).copy_(
                    placed.laid(moment, param)
                )
        else:
            own[name] = value
    return own


def _floats(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    part = states.decode(placed.local(codes), placed.local(scales), signed)
    return placed.wrap(part, codes, tuple(codes.shape))


def _codes(
    param: Tensor, moment: Tensor, scales: Tensor | None, signed: bool
) -> tuple[Tensor, Tensor]:
    """Codes and scales by the rows of the parameter, in memory of their own.

    Older files have one row of all elements: where rows are whole blocks their scales are those of
    the rows, else the values are rounded anew.
    """
    placed.check_blocks(param)
    shape, leading = states.scales_shape(param.shape), states.leading_of(param.shape)
    whole = states.row_of(param.shape, leading) % states.BLOCK == 0
    if scales is not None and scales.shape != shape:
        if whole and scales.ndim == 1:
            scales = scales.reshape(shape)
        else:
            moment, scales = _floats(moment, scales, signed), None
    part = placed.local(placed.laid(moment, param))
    if scales is None:
        codes, absmax = states.encode(part.float(), signed, leading)
    else:
        codes, absmax = part, placed.local(placed.laid(scales, param))
    device = placed.local(param).device
    codes = codes.to(device, copy=True, memory_format=torch.contiguous_format)
    absmax = absmax.to(device, torch.float32, copy=True, memory_format=torch.contiguous_format)
    return placed.wrap(codes, param, tuple(param.shape)), placed.wrap(absmax, param, shape)


def unhook(hooks: dict[int, Any], own: Callable[..., Any]) -> None:
    """Take a hook out of a table of them."""
    for key in [key for key, hook in hooks.items() if hook is own]:
        del hooks[key]


def restorer(optimizer: Optimizer) -> Callable[[], None]:
    """Gives states and groups back as they are now; the tensors in them are not copied."""
    state, groups = optimizer.state, optimizer.param_groups
    held_before = [(param, held, dict(held)) for param, held in state.items()]
    options = [(group, {**group, "params": list(group["params"])}) for group in groups]

    def restore() -> None:
        optimizer.state, optimizer.param_groups = state, groups
        state.clear()
        for param, held, before in held_before:
            held.clear()
            held.update(before)
            state[param] = held
        groups[:] = [group for group, _ in options]
        for group, before in options:
            group.clear()
            group.update(before)

    return restore
