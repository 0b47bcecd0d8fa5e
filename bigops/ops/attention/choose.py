"""What serves `attention`, for dispatch and for `bigops.explain`.

The CPU kernel registers itself (csrc/cpu/attention.cpp) and hands over to torch's own where that is
faster; elsewhere torch's own serves.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from bigops.formats import checks
from bigops.ops import targets
from bigops.ops.attention.check import check
from bigops.ops.attention.reference import reference, serve
from bigops.ops.choice import Choice, on_cpu
from bigops.ops.choice import reference as by_reference
from bigops.ops.explain import serves
from bigops.ops.library import arguments, define, loop, register
from bigops.ops.targets import Target

NAME = "attention"
INFERENCE_ONLY = (
    "attention: inference only, and a gradient was asked for; call it under torch.no_grad() or "
    "torch.inference_mode(), or take torch.nn.functional.scaled_dot_product_attention"
)

op = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float? scale, "
    "bool bf16=False) -> Tensor",
    serve,
)
Problem: Any = arguments(op)
"""The arguments of the op by name."""


def refuse_gradients(*_: Any) -> NoReturn:
    raise RuntimeError(INFERENCE_ONLY)


def _fake(*args: Any) -> Tensor:
    q, k, v, mask, _, scale, _ = Problem(*args)
    check(q, k, v, mask, scale)
    b, heads, t, _ = q.shape
    return q.new_empty(b, t, heads, v.shape[3]).transpose(1, 2)


def _expression(*args: Any) -> Tensor:
    problem = Problem(*args)
    return reference(
        problem.q, problem.k, problem.v, problem.mask, causal=problem.causal, scale=problem.scale
    )


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    """A batch of all of q, k and v is more items of one call; other batches go one by one."""
    problem, dims, batch = Problem(*args), Problem(*in_dims), info.batch_size
    if None in (dims.q, dims.k, dims.v) or batch == 0:
        return loop(op, args, in_dims, batch), 0
    q, k, v = (
        t.movedim(dim, 0).flatten(0, 1)
        for t, dim in ((problem.q, dims.q), (problem.k, dims.k), (problem.v, dims.v))
    )
    mask = problem.mask
    if mask is not None:
        mask = mask.unsqueeze(0) if dims.mask is None else mask.movedim(dims.mask, 0)
        mask = mask.reshape(len(mask), *(1,) * (5 - mask.dim()), *mask.shape[1:])
        if len(mask) * mask.shape[1] != 1:
            items = q.shape[0] // batch
            mask = mask.expand(batch, items, *mask.shape[2:]).flatten(0, 1)
        else:
            mask = mask.flatten(0, 1)
    y = op(q, k, v, mask, problem.causal, problem.scale, problem.bf16)
    return y.unflatten(0, (batch, -1)), 0


register(op, fake=_fake, backward=refuse_gradients, vmap=_vmap, expression=_expression)


def choose(problem: Any, target: Target) -> Choice:
    """The kernel that serves a call on ``target``."""
    q, v = problem.q, problem.v
    if not targets.is_cpu(target):
        return by_reference(
            NAME, f"torch's scaled_dot_product_attention: no own kernel for {target}"
        )
    b, heads, t, d = q.shape
    _, own, s, dv = v.shape
    shape = (b * own, heads // max(own, 1), t, s, d, dv)

    def ask(extension: Any) -> tuple[str, str]:
        found: tuple[str, str] = extension.choose_attention(
            *shape, checks.short(q.dtype), problem.bf16
        )
        return found

    return on_cpu(NAME, ask)


@serves(NAME)
def _explain(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    bf16: bool = False,
    device: str | None = None,
) -> Choice:
    problem = Problem(q, k, k if v is None else v, mask, causal, scale, bf16)
    check(problem.q, problem.k, problem.v, mask, scale)
    return choose(problem, targets.named(device, q))
