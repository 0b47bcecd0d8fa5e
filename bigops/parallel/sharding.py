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
its first half of rows is no half of the op. The rows of a quantised weight split by whole tiles of
16, as many for each rank; a dynamically quantised row of x needs all of K for its range. The
storage of ``sparse_linear`` has no sub-tensor that belongs to some rows alone; where its values are
trained, their gradient is an open sum over the ranks' rows of x.

The weight of ``fp8_linear`` splits by N likewise, with scales in blocks by whole blocks of 128.

The factors u [N, r] and v [r, K] of ``low_rank_linear`` split by rows of x, by N (rows of u and of
the base; every rank then makes x v^T) and, without an activation and a base, by r (columns of u,
rows of v; a sum over ranks is open). By N each rank needs r rows of u, since a rank above the
smaller side is refused. K is not split: v would be, at once with r.

``linear_cross_entropy`` splits by tokens with reduction "none" (the losses are split) and "sum" (a
sum over ranks is open), gradients of weight and bias being open sums; the weight is whole. "mean"
is not split, since each rank would divide by its own tokens, nor are the classes, whose softmax
needs all of them, nor K.
"""

from __future__ import annotations

from typing import Any

import torch

from bigops.ops.activation import GATED  # importing bigops.ops defines the ops named below
from bigops.ops.library import in_words
from bigops.parallel import _fp8_rules, _loss_rules
from bigops.parallel._rule import Rule, Weight, _if, stored_linear, stored_linear_backward

_OPS = (
    "fp8_linear",
    "fp8_linear_backward",
    "fused_linear",
    "fused_linear_with_preact",
    "fused_linear_backward",
    "linear_cross_entropy",
    "linear_cross_entropy_with_grad",
    "linear_cross_entropy_backward",
    "low_rank_linear",
    "low_rank_linear_with_parts",
    "low_rank_linear_backward",
    "packed_linear",
    "packed_linear_backward",
    "quantized_linear",
    "quantized_linear_backward",
    "quantized_linear_grid",
    "sparse24_linear",
    "sparse24_linear_backward",
    "sparse_linear",
    "sparse_linear_backward",
    "sparse_linear_grid",
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
    from torch.distributed.tensor.experimental import register_sharding

    for name in _OPS:
        op = getattr(torch.ops.bigops, name).code
        rules = _fp8_rules if name.startswith("fp8") else _loss_rules
        rule = globals().get(f"_{name}") or getattr(rules, name)
        register_sharding(op)(in_words(op, rule))
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


def _packed_linear(
    x: Any, panels: Any, pad: int, k: int, bias: Any, residual: Any, activation: str
) -> list[Rule]:
    splits = _whole_tiles(panels, pad)
    return stored_linear(x, _packed_weight, splits, bias, residual)


def _packed_linear_backward(
    grad: Any,
    x: Any,
    panels: Any,
    pad: int,
    k: int,
    bias: Any,
    activation: str,
    need_x: bool,
    need_bias: bool,
) -> list[Rule]:
    splits = _whole_tiles(panels, pad)
    return stored_linear_backward(x, _packed_weight, splits, bias, need_x, need_bias)


def _packed_weight(split: bool) -> list[Any]:
    """Placements of the panels and of their two numbers."""
    from torch.distributed.tensor import Replicate, Shard

    return [Shard(0) if split else Replicate(), None, None]


def _quantized_weight(*tensors: Any) -> Weight:
    """Placements of the storage and of its five numbers: N is split by tiles or by lanes."""
    from torch.distributed.tensor import Replicate, Shard

    def placed(split: bool) -> list[Any]:
        whole = Replicate()
        tile, lane = (Shard(0), Shard(1)) if split else (whole, whole)
        given = zip(tensors, (tile, lane, lane, tile, whole), strict=True)
        return [*(_if(tensor, placement) for tensor, placement in given), *[None] * 5]

    return placed


def _whole_tiles(values: Any, pad: int) -> bool:
    """Whether every rank gets as many tiles, none of them padded."""
    return pad == 0 and values.shape[0] % values.mesh.size() == 0


def _quantized_linear(
    x: Any,
    values: Any,
    scale: Any,
    zero_point: Any,
    row_sum: Any,
    x_grid: Any,
    pad: int,
    k: int,
    bits: int,
    group: int,
    activations: str,
    bias: Any,
    residual: Any,
    activation: str,
) -> list[Rule]:
    weight = _quantized_weight(values, scale, zero_point, row_sum, x_grid)
    return stored_linear(x, weight, _whole_tiles(values, pad), bias, residual)


def _quantized_linear_backward(
    grad: Any,
    x: Any,
    values: Any,
    scale: Any,
    zero_point: Any,
    row_sum: Any,
    x_grid: Any,
    pad: int,
    k: int,
    bits: int,
    group: int,
    activations: str,
    bias: Any,
    activation: str,
    need_x: bool,
    need_bias: bool,
) -> list[Rule]:
    weight = _quantized_weight(values, scale, zero_point, row_sum, x_grid)
    splits = _whole_tiles(values, pad)
    return stored_linear_backward(x, weight, splits, bias, need_x, need_bias)


def _sparse_linear(x: Any, *args: Any) -> list[Rule]:
    return _split_rows(x, args[:-5], 2, *args[-3:-1])


def _sparse24_linear(x: Any, *args: Any) -> list[Rule]:
    return _split_rows(x, args[:-3], 0, *args[-3:-1])


def _split_rows(
    x: Any, storage: tuple[Any, ...], sizes: int, bias: Any, residual: Any
) -> list[Rule]:
    """Rows of x are split and the weight is whole; after its storage come ``sizes`` numbers."""
    from torch.distributed.tensor import Replicate, Shard

    def rule(rows: Any) -> Rule:
        whole = Replicate()
        weight = [*(_if(t, whole) for t in storage), *[None] * sizes]
        return [rows], [rows, *weight, _if(bias, whole), _if(residual, rows), None]

    return [rule(Replicate()), *(rule(Shard(d)) for d in range(x.ndim - 1))]


def _sparse_linear_backward(grad: Any, x: Any, *args: Any) -> list[Rule]:
    return _split_rows_backward(x, args[:-7], 2, args[-5], *args[-3:])


def _sparse24_linear_backward(grad: Any, x: Any, *args: Any) -> list[Rule]:
    return _split_rows_backward(x, args[:-5], 0, args[-5], *args[-3:])


def _split_rows_backward(
    x: Any, storage: tuple[Any, ...], sizes: int, bias: Any, need_x: bool, *needs: bool
) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole = Replicate()

    def rule(rows: Any, summed: Any) -> Rule:
        results = [rows if need_x else whole, *(summed if need else whole for need in needs)]
        weight = [*(_if(t, whole) for t in storage), *[None] * sizes]
        return results, [rows, rows, *weight, _if(bias, whole), None, None, None, None]

    return [rule(whole, whole), *(rule(Shard(d), Partial()) for d in range(x.ndim - 1))]


def _quantized_linear_grid(*args: Any) -> list[Rule]:
    *before, y_grid, bias, residual, activation = args
    rest: list[Any] = [*before, bias, residual, activation]
    rules = _quantized_linear(*rest)
    return _with_grids(rules, len(before), y_grid)


def _sparse_linear_grid(*args: Any) -> list[Rule]:
    *before, x_grid, y_grid, bias, residual, activation = args
    rest: list[Any] = [*before, bias, residual, activation]
    rules = _sparse_linear(*rest)
    return _with_grids(rules, len(before), x_grid, y_grid)


def _with_grids(rules: list[Rule], place: int, *grids: Any) -> list[Rule]:
    """The rules of the op without grids, and each rank has the grids whole."""
    from torch.distributed.tensor import Replicate

    whole = [_if(grid, Replicate()) for grid in grids]
    return [(results, [*given[:place], *whole, *given[place:]]) for results, given in rules]


def _low_rank_linear(
    x: Any,
    u: Any,
    v: Any,
    bias: Any,
    residual: Any,
    base: Any,
    activation: str,
    scale: float,
    parts: bool = False,
) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = x.ndim - 1
    whole = Replicate()

    def rule(y: Any, t: Any, x_: Any, u_: Any, v_: Any, row: Any, base_: Any) -> Rule:
        # z of activation "none" is an empty tensor, which cannot be split.
        results = [y, t, whole if activation == "none" else y] if parts else [y]
        given = (_if(bias, row), _if(residual, y), _if(base, base_))
        return results, [x_, u_, v_, *given, None, None]

    rules = [rule(whole, whole, whole, whole, whole, whole, whole)]
    for d in range(last):
        rules.append(rule(Shard(d), Shard(d), Shard(d), whole, whole, whole, whole))
    if _rows_for_rank(u):
        rules.append(rule(Shard(last), whole, whole, Shard(0), whole, Shard(0), Shard(0)))
    if activation == "none" and base is None:
        open_sum = Partial()
        rules.append(rule(open_sum, Shard(last), whole, Shard(1), Shard(0), open_sum, whole))
    return rules


def _low_rank_linear_with_parts(
    x: Any, u: Any, v: Any, bias: Any, residual: Any, base: Any, activation: str, scale: float
) -> list[Rule]:
    return _low_rank_linear(x, u, v, bias, residual, base, activation, scale, parts=True)


def _low_rank_linear_backward(
    grad: Any,
    x: Any,
    u: Any,
    v: Any,
    base: Any,
    t: Any,
    preact: Any,
    activation: str,
    scale: float,
    *needs: bool,
) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = x.ndim - 1
    whole, open_sum = Replicate(), Partial()

    def rule(grads: tuple[Any, ...], z: Any, x_: Any, u_: Any, v_: Any, t_: Any) -> Rule:
        results = [g if need else whole for g, need in zip(grads, needs, strict=True)]
        base_ = u_ if u_ == Shard(0) else whole
        given = (z, x_, u_, v_, _if(base, base_), t_, _if(preact, z))
        return results, [*given, *[None] * 7]

    # Gradients of x, u, v, bias and base.
    grads: tuple[Any, ...] = (whole,) * 5
    rules = [rule(grads, whole, whole, whole, whole, whole)]
    for d in range(last):
        grads = (Shard(d), open_sum, open_sum, open_sum, open_sum)
        rules.append(rule(grads, Shard(d), Shard(d), whole, whole, Shard(d)))
    if _rows_for_rank(u):
        grads = (open_sum, Shard(0), open_sum, Shard(0), Shard(0))
        rules.append(rule(grads, Shard(last), whole, Shard(0), whole, whole))
    if base is None:
        grads = (open_sum, Shard(1), Shard(0), whole, whole)
        rules.append(rule(grads, whole, whole, Shard(1), Shard(0), Shard(last)))
    return rules


def _rows_for_rank(u: Any) -> bool:
    """Whether every rank of the mesh gets as many rows of u [N, r], and at least r."""
    n, rank = u.shape
    ranks = u.mesh.size()
    return bool(n % ranks == 0 and n // ranks >= rank)
