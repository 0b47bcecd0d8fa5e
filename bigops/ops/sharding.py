"""What a sharding rule for DTensor is, and those of every op with a stored weight.

A rule is one way in which each rank can run an op on its own part and get its own part of the
result. Rules are asked for with specs of tensors in place of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from bigops.formats.base import Format
from bigops.ops.family import GridOp, LinearOp

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

# Placements of the results and of the arguments; None for whatever is no tensor.
Rule: TypeAlias = "tuple[list[Placement | None], list[Placement | None]]"
Rules: TypeAlias = "Callable[..., list[Rule]]"


def if_given(tensor: Any, placement: Placement) -> Placement | None:
    """``placement`` where there is a tensor."""
    return None if tensor is None else placement


def of_linear_op(op: LinearOp) -> Rules:
    """Rows of x are split, or where the format says so those of the weight."""
    return lambda *args: _forward(op, op.arguments, args)


def of_grid_op(op: GridOp) -> Rules:
    """The rules of the op without grids; each rank has the grids whole."""
    return lambda *args: _forward(op.op, op.arguments, args)


def _forward(op: LinearOp, names: tuple[str, ...], args: tuple[Any, ...]) -> list[Rule]:
    from torch.distributed.tensor import Replicate, Shard

    named = dict(zip(names, args, strict=True))
    x, whole = named["x"], Replicate()
    last = x.ndim - 1
    weight = op.format.of(x.shape[-1], *(named[field] for field in op.fields))

    def rule(y: Any, x_: Any, split: bool = False) -> Rule:
        placed = {
            **weight.placements(split),
            "x": x_,
            "bias": if_given(named["bias"], Shard(0) if split else whole),
            "residual": if_given(named["residual"], y),
            "x_grid": if_given(named.get("x_grid"), whole),
            "y_grid": if_given(named.get("y_grid"), whole),
        }
        return [y], [placed.get(name) for name in names]

    rules = [rule(whole, whole), *(rule(Shard(d), Shard(d)) for d in range(last))]
    return [*rules, rule(Shard(last), whole, True)] if _splits(weight, x) else rules


def _splits(weight: Format, x: Any) -> bool:
    """Whether the ranks may have rows of W; single rows need not be as many for each."""
    dims = weight.row_dims()
    return bool(dims) and (weight.row_unit == 1 or weight.splits(x.mesh.size()))


def of_backward(op: LinearOp) -> Rules:
    """Rules of the backward op, which gives the gradients of x, bias and stored values."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    names, needs = op.gradients.arguments, op.gradients.needs

    def rules(*args: Any) -> list[Rule]:
        named = dict(zip(names, args, strict=True))
        x, whole = named["x"], Replicate()
        last = x.ndim - 1
        weight = op.format.of(x.shape[-1], *(named[field] for field in op.fields))

        def rule(gx: Any, others: Any, grad: Any, x_: Any, split: bool = False) -> Rule:
            gradients = {"need_x": gx, "need_values": others, "need_bias": others}
            # An unneeded gradient is an empty tensor, which cannot be split.
            results = [gradients[need] if named[need] else whole for need in needs]
            bias = if_given(named["bias"], Shard(0) if split else whole)
            placed = {**weight.placements(split), "grad": grad, "x": x_, "bias": bias}
            return results, [placed.get(name) for name in names]

        found = [rule(whole, whole, whole, whole)]
        found += [rule(Shard(d), Partial(), Shard(d), Shard(d)) for d in range(last)]
        if _splits(weight, x):
            found.append(rule(Partial(), Shard(0), Shard(last), whole, True))
        return found

    return rules
