"""What a sharding rule for DTensor is, and those of every op with a stored weight.

A rule is one way in which each rank can run an op on its own part and get its own part of the
result. Rules are asked for with specs of tensors in place of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from bigops.formats.base import Format
from bigops.ops.activation import GATED
from bigops.ops.family import LinearOp, U8Op

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

# Placements of the results and of the arguments; None for whatever is no tensor.
Rule: TypeAlias = "tuple[list[Placement | None], list[Placement | None]]"
Rules: TypeAlias = "Callable[..., list[Rule]]"
Split: TypeAlias = "dict[str, Placement]"
_PLAIN = (bool, int, float, str)


def if_given(tensor: Any, placement: Placement) -> Placement | None:
    """``placement`` where there is a tensor."""
    return None if tensor is None else placement


def of_linear_op(op: LinearOp, kept: tuple[str, ...] = ()) -> Rules:
    """Rows of x are split, or as the format says rows of the weight, or what is summed.

    ``kept``: what the op gives besides y.
    """
    return lambda *args: _forward(op, op.arguments, args, kept)


def of_u8_op(op: U8Op) -> Rules:
    """The rules of the op without qparams; each rank has the qparams whole."""
    return lambda *args: _forward(op.op, op.arguments, args, ())


def _forward(
    op: LinearOp, names: tuple[str, ...], args: tuple[Any, ...], kept: tuple[str, ...]
) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    named, whole = dict(zip(names, args, strict=True)), Replicate()
    x, activation, weight = named["x"], named["activation"], _weight(op, named)
    last = x.ndim - 1

    def rule(y: Any, bias: Any, split: Split) -> Rule:
        placed = {"y": y, "residual": y, "preact": y, "bias": bias, **split}
        return _rule(named, names, ["y", *kept], placed)

    rules = [rule(whole, whole, {})]
    rules += [rule(Shard(d), whole, {"x": Shard(d), "t": Shard(d)}) for d in range(last)]
    if _rows_split(weight, x) and activation not in GATED:
        rules.append(rule(Shard(last), Shard(0), _shards(weight.row_dims(), last)))
    if weight.sum_dims() and activation == "none":
        # What is added once must be added on one rank only: Partial splits it up.
        rules.append(rule(Partial(), Partial(), _shards(weight.sum_dims(), last)))
    return rules


def of_backward(op: LinearOp) -> Rules:
    """Rules of the backward op, which gives the gradients of x, bias and trained tensors."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    names, needs = op.gradients.arguments, op.gradients.needs

    def rules(*args: Any) -> list[Rule]:
        named, whole = dict(zip(names, args, strict=True)), Replicate()
        x, weight = named["x"], _weight(op, named)
        last = x.ndim - 1

        def rule(grad: Any, gx: Any, others: Any, split: Split) -> Rule:
            """``split``: of tensors, whose gradients lie as they do; ``others``: of the others."""
            placed = {"grad": grad, "preact": grad, **split}
            gradients = {"need_x": gx, **{f"need_{name}": p for name, p in split.items()}}
            made = {
                # An unneeded gradient is an empty tensor, which cannot be split.
                need: gradients.get(need, others) if named[need] else whole
                for need in needs
            }
            return _rule(named, names, needs, {**placed, **made})

        found = [rule(whole, whole, whole, {})]
        found += [
            rule(Shard(d), Shard(d), Partial(), {"x": Shard(d), "t": Shard(d)}) for d in range(last)
        ]
        if _rows_split(weight, x) and named["activation"] not in GATED:
            split = {"bias": Shard(0), **_shards(weight.row_dims(), last)}
            found.append(rule(Shard(last), Partial(), Partial(), split))
        if weight.sum_dims():
            split = _shards(weight.sum_dims(), last)
            found.append(rule(whole, split.get("x", Partial()), whole, split))
        return found

    return rules


def _rule(
    named: dict[str, Any], names: Sequence[str], results: Sequence[str], placed: dict[str, Any]
) -> Rule:
    """Placements by name as a rule; what has none is whole."""
    from torch.distributed.tensor import Replicate

    whole = Replicate()
    if named["activation"] == "none":
        placed["preact"] = whole  # an empty tensor, which cannot be split
    tensors = (None if isinstance(named[n], _PLAIN) else named[n] for n in names)
    return (
        [placed.get(name, whole) for name in results],
        [if_given(t, placed.get(n, whole)) for n, t in zip(names, tensors, strict=True)],
    )


def _weight(op: LinearOp, named: dict[str, Any]) -> Format:
    return op.format.of(named["x"].shape[-1], *(named[field] for field in op.fields))


def _shards(dims: dict[str, int], last: int) -> Split:
    from torch.distributed.tensor import Shard

    return {name: Shard(last if dim < 0 else dim) for name, dim in dims.items()}


def _rows_split(weight: Format, x: Any) -> bool:
    """Whether the ranks may have rows of W; single rows need not be as many for each."""
    dims = weight.row_dims()
    return bool(dims) and (weight.row_unit == 1 or weight.splits(x.mesh.size()))
