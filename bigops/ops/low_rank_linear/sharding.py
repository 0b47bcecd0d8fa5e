"""Sharding rules of low_rank_linear; `bigops.parallel.sharding` says what they allow."""

from __future__ import annotations

from typing import Any

from bigops.ops.sharding import Rule, if_given


def low_rank_linear(
    x: Any,
    u: Any,
    v: Any,
    base: Any,
    scale: float,
    bias: Any,
    residual: Any,
    activation: str,
    parts: bool = False,
) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = x.ndim - 1
    whole = Replicate()

    def rule(y: Any, t: Any, x_: Any, u_: Any, v_: Any, row: Any, base_: Any) -> Rule:
        # z of activation "none" is an empty tensor, which cannot be split.
        results = [y, t, whole if activation == "none" else y] if parts else [y]
        given = (if_given(bias, row), if_given(residual, y))
        return results, [x_, u_, v_, if_given(base, base_), None, *given, None]

    rules = [rule(whole, whole, whole, whole, whole, whole, whole)]
    for d in range(last):
        rules.append(rule(Shard(d), Shard(d), Shard(d), whole, whole, whole, whole))
    if _rows_for_rank(u):
        rules.append(rule(Shard(last), whole, whole, Shard(0), whole, Shard(0), Shard(0)))
    if activation == "none" and base is None:
        open_sum = Partial()
        rules.append(rule(open_sum, Shard(last), whole, Shard(1), Shard(0), open_sum, whole))
    return rules


def low_rank_linear_with_parts(
    x: Any, u: Any, v: Any, base: Any, scale: float, bias: Any, residual: Any, activation: str
) -> list[Rule]:
    return low_rank_linear(x, u, v, base, scale, bias, residual, activation, parts=True)


def low_rank_linear_backward(
    grad: Any,
    x: Any,
    u: Any,
    v: Any,
    base: Any,
    scale: float,
    t: Any,
    preact: Any,
    activation: str,
    *needs: bool,
) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = x.ndim - 1
    whole, open_sum = Replicate(), Partial()

    def rule(grads: tuple[Any, ...], z: Any, x_: Any, u_: Any, v_: Any, t_: Any) -> Rule:
        results = [g if need else whole for g, need in zip(grads, needs, strict=True)]
        base_ = u_ if u_ == Shard(0) else whole
        preact_ = whole if activation == "none" else z  # an empty tensor then
        given = (z, x_, u_, v_, if_given(base, base_), None, t_, if_given(preact, preact_))
        return results, [*given, *[None] * 6]

    # Gradients of x, u, v, base and bias.
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
