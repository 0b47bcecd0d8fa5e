"""How the ops split over a device mesh: sharding rules for DTensor.

Call ``register_sharding_rules()`` once, before the ops see a DTensor; importing
torch.distributed.tensor takes long, so nothing here happens by itself. With the rules, the layers
work under ``distribute_tensor`` and torch's tensor parallel plans (ColwiseParallel and
RowwiseParallel), gradients included.

Each rule is one way in which every rank can run the op on its own part and get its own part of
the result; DTensor picks the one that moves the fewest bytes. W is [N, K] here:

========================  ==================  ================  ==========================
split along               x [.., K]           W                 y [.., N]
========================  ==================  ================  ==========================
rows of x                 split               whole             split
N, not for gated pairs    whole               rows split        last dimension split
K, only without an        last dim. split     columns split     a sum over ranks is open
activation, dense only
========================  ==================  ================  ==========================

A gated weight [2N, K] has a gate row and an up row for each column of y, half the weight apart:
its first half of rows is no half of the op. A dynamically quantised row needs all of K for its
range. The storage of ``sparse_linear`` has no sub-tensor that belongs to some rows alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bigops.ops._activation import GATED  # importing bigops.ops defines the ops named below

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

    # One entry per result and per argument; None for whatever is no tensor.
    Rule = tuple[list[Placement | None], list[Placement | None]]

_OPS = (
    "fused_linear",
    "fused_linear_with_preact",
    "fused_linear_backward",
    "quantized_linear",
    "quantized_linear_backward",
    "sparse_linear",
    "sparse_linear_backward",
)
_registered = False


def register_sharding_rules() -> None:
    """Tell DTensor how the ops of bigops split. Further calls do nothing.

    Raises:
        RuntimeError: torch was built without torch.distributed.
    """
    global _registered
    if _registered:
        return
    if not torch.distributed.is_available():
        raise RuntimeError("register_sharding_rules: this torch was built without distributed")
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    for name in _OPS:
        op = getattr(torch.ops.bigops, name).default
        register_sharding(op)(globals()[f"_{name}"])
        # DTensor caches a choice by the tensors' shapes and by the arguments from static_argnum
        # on; register_sharding counts integers only. Without this line "swiglu" would get the
        # split that "relu" was given for equal shapes.
        known[op].static_argnum = 1
    _registered = True


# --- rules: (placements of results, placements of arguments) -----------------------------------


def _fused_linear(
    x: Any, weight: Any, bias: Any, residual: Any, activation: str, results: int = 1
) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = x.ndim - 1

    def rule(y: Any, x_: Any, weight_: Any, bias_: Any, residual_: Any) -> Rule:
        given = (_if(bias, bias_), _if(residual, residual_))
        return [y] * results, [x_, weight_, *given, None]

    whole = Replicate()
    rules = [rule(whole, whole, whole, whole, whole)]
    rules += [rule(Shard(d), Shard(d), whole, whole, Shard(d)) for d in range(last)]
    if activation not in GATED:
        rules.append(rule(Shard(last), whole, Shard(0), Shard(0), Shard(last)))
    if activation == "none":
        # What is added once must be added on one rank only: Partial splits it up.
        rules.append(rule(Partial(), Shard(last), Shard(1), Partial(), Partial()))
    return rules


def _fused_linear_with_preact(
    x: Any, weight: Any, bias: Any, residual: Any, activation: str
) -> list[Rule]:
    return _fused_linear(x, weight, bias, residual, activation, results=2)


def _fused_linear_backward(
    grad: Any,
    x: Any,
    weight: Any,
    preact: Any,
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = x.ndim - 1
    whole = Replicate()

    def rule(gx: Any, gw: Any, gb: Any, grad_: Any, x_: Any, weight_: Any) -> Rule:
        # An unneeded gradient is an empty tensor, which cannot be split.
        needed = zip((need_x, need_weight, need_bias), (gx, gw, gb), strict=True)
        results = [placement if need else whole for need, placement in needed]
        return results, [grad_, x_, weight_, _if(preact, grad_), None, None, None, None]

    rules = [rule(whole, whole, whole, whole, whole, whole)]
    for d in range(last):
        rules.append(rule(Shard(d), Partial(), Partial(), Shard(d), Shard(d), whole))
    if activation not in GATED:
        rules.append(rule(Partial(), Shard(0), Shard(0), Shard(last), whole, Shard(0)))
    rules.append(rule(Shard(last), Shard(1), whole, whole, Shard(last), Shard(1)))
    return rules


def _quantized_linear(
    x: Any, weight: Any, scale: Any, bias: Any, residual: Any, activation: str
) -> list[Rule]:
    from torch.distributed.tensor import Replicate, Shard

    last = x.ndim - 1

    def rule(y: Any, x_: Any, weight_: Any) -> Rule:
        return [y], [x_, weight_, weight_, _if(bias, weight_), _if(residual, y), None]

    rules = [rule(Replicate(), Replicate(), Replicate())]
    rules += [rule(Shard(d), Shard(d), Replicate()) for d in range(last)]
    rules.append(rule(Shard(last), Replicate(), Shard(0)))
    return rules


def _quantized_linear_backward(
    grad: Any,
    x: Any,
    weight: Any,
    scale: Any,
    bias: Any,
    activation: str,
    need_x: bool,
    need_bias: bool,
) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = x.ndim - 1
    whole = Replicate()

    def rule(gx: Any, gb: Any, grad_: Any, x_: Any, weight_: Any) -> Rule:
        results = [gx if need_x else whole, gb if need_bias else whole]
        return results, [grad_, x_, weight_, weight_, _if(bias, weight_), None, None, None]

    rules = [rule(whole, whole, whole, whole, whole)]
    rules += [rule(Shard(d), Partial(), Shard(d), Shard(d), whole) for d in range(last)]
    rules.append(rule(Partial(), Shard(0), Shard(last), whole, Shard(0)))
    return rules


def _sparse_linear(
    x: Any,
    values: Any,
    index: Any,
    rows_: Any,
    length: Any,
    ptr: Any,
    scale: Any,
    sums: Any,
    n: int,
    chunk: int,
    bias: Any,
    residual: Any,
    activation: str,
) -> list[Rule]:
    from torch.distributed.tensor import Replicate, Shard

    def rule(rows: Any) -> Rule:
        whole = Replicate()
        weight = [*[whole] * 5, _if(scale, whole), _if(sums, whole), None, None]
        return [rows], [rows, *weight, _if(bias, whole), _if(residual, rows), None]

    return [rule(Replicate()), *(rule(Shard(d)) for d in range(x.ndim - 1))]


def _sparse_linear_backward(
    grad: Any,
    x: Any,
    values: Any,
    index: Any,
    rows_: Any,
    length: Any,
    ptr: Any,
    scale: Any,
    sums: Any,
    n: int,
    chunk: int,
    bias: Any,
    activation: str,
    need_x: bool,
    need_values: bool,
    need_bias: bool,
) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole = Replicate()

    def rule(rows: Any, summed: Any) -> Rule:
        results = [rows if need_x else whole]
        results += [summed if need else whole for need in (need_values, need_bias)]
        weight = [*[whole] * 5, _if(scale, whole), _if(sums, whole), None, None]
        return results, [rows, rows, *weight, _if(bias, whole), None, None, None, None]

    return [rule(whole, whole), *(rule(Shard(d), Partial()) for d in range(x.ndim - 1))]


def _if(tensor: Any, placement: Placement) -> Placement | None:
    return None if tensor is None else placement
