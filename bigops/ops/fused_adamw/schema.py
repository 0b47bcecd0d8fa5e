"""Schemas of the optimiser steps, their fakes, and autograd, which refuses them.

A step has no gradient: where a graph would be recorded it is refused, never silently None. Both
steps mutate in place what their schema marks, and bump its version counter.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bigops.ops.fused_adamw import reference
from bigops.ops.library import LIB, arguments, define

_ADAMW_LISTS = (
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor(e!)[] exp_avg_scales, Tensor(f!)[] exp_avg_sq_scales, "
    "Tensor(g!)[] copies"
)
_ROUNDING = "int[] streams, int seed, int rounding_step, int[] firsts, int[] runs, int[] strides"
_ADAMW_OPTIONS = (
    "float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, "
    f"bool maximize, float grad_factor, {_ROUNDING}"
)
adamw_op = define(
    f"fused_adamw({_ADAMW_LISTS}, {_ADAMW_OPTIONS}) -> ()",
    lambda *args: reference.adamw(AdamWStep(*args)),
)
sgd_op = define(
    "fused_sgd(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] momentum_scales, Tensor(d!)[] copies, float lr, float momentum, "
    "float dampening, float weight_decay, bool nesterov, bool first_step, bool maximize, "
    f"float grad_factor, {_ROUNDING}) -> ()",
    lambda *args: reference.sgd(SGDStep(*args)),
)
AdamWStep: Any = arguments(adamw_op)
SGDStep: Any = arguments(sgd_op)
norm_op = define("fused_grad_norm(Tensor[] grads) -> Tensor", reference.norm)

# The CUDA C++ kernels by themselves, for a GPU only.
LIB.define(
    f"fused_adamw_step({_ADAMW_LISTS}, Tensor[] maps, bool steps_on_device, Tensor? norm, "
    f"float clip_norm, {_ADAMW_OPTIONS}) -> ()"
)
LIB.define("fused_grad_norm_step(Tensor[] grads) -> Tensor")


@torch.library.register_fake("bigops::fused_adamw", lib=LIB)
@torch.library.register_fake("bigops::fused_sgd", lib=LIB)
def _fake_step(*args):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("bigops::fused_grad_norm", lib=LIB)
def _fake_norm(grads):  # type: ignore[no-untyped-def]
    device = grads[0].device if grads else "cpu"
    return torch.empty((), dtype=torch.float64, device=device)


def _refuse(op: Any) -> None:
    name = op.name().removeprefix("bigops::")

    def autograd(keyset: Any, *args: Any) -> Any:
        lists = (a for a in args if isinstance(a, list | tuple))
        if torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for tensors in lists for t in tensors
        ):
            raise RuntimeError(
                f"{name}: expected a call under torch.no_grad(), since it has no gradient; got "
                "tensors that require grad"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def bump(keyset: Any, *args: Any) -> Any:
        count_versions(op, args)
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    LIB.impl(name, autograd, "Autograd", with_keyset=True)
    if any(_mutated(op)):
        LIB.impl(name, bump, "ADInplaceOrView", with_keyset=True)


@functools.cache
def _mutated(op: Any) -> tuple[bool, ...]:
    return tuple(argument.alias_info is not None for argument in op._schema.arguments)


def count_versions(op: Any, args: Iterable[Any]) -> None:
    """Bump the version counters of what ``op`` mutates."""
    for tensors in itertools.compress(args, _mutated(op)):
        torch.autograd.graph.increment_version(tensors)


def _below_autograd(op: Any, *args: Any) -> None:
    """Call a mutating op past the two keys above, each of which costs a turn of all lists.

    100 tensors: 0.3 ms a step. The version counters are bumped here then.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        op(*args)
        return
    with torch._C._AutoDispatchBelowADInplaceOrView():
        op(*args)
    count_versions(op, args)


def transposed(
    places: Sequence[tuple[int, int, int]],
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """The lists firsts, runs and strides of an op."""
    return tuple(zip(*places, strict=True)) if places else ((), (), ())  # type: ignore[return-value]


def step_adamw(*args: Any) -> None:
    """The op `fused_adamw` without the checks of the public function; under torch.no_grad()."""
    _below_autograd(adamw_op, *args)


def step_sgd(*args: Any) -> None:
    """The op `fused_sgd`, likewise."""
    _below_autograd(sgd_op, *args)


for _op in (adamw_op, sgd_op, norm_op):
    _refuse(_op)
