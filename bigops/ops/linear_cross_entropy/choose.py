"""What serves `linear_cross_entropy`, for dispatch and for `bigops.explain`.

The pass over a chunk has a CPU kernel (csrc/cpu/linear_cross_entropy.cpp) and a Triton kernel,
elsewhere it is `reference.serve_chunk`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigops.backend import machine
from bigops.formats import checks
from bigops.ops.choice import Choice
from bigops.ops.explain import serves
from bigops.ops.library import register
from bigops.ops.linear_cross_entropy import autograd, chunked, schema, triton
from bigops.ops.linear_cross_entropy.check import check

register(schema.chunk_op, fake=schema.fake_chunk, cuda=triton.serve_chunk)
register(
    schema.forward_op,
    fake=schema.fake,
    backward=autograd.backward,
    expression=autograd.by_reference,
    setup=autograd.setup,
    vmap=autograd.vmap,
)
register(
    schema.with_grad_op,
    fake=schema.fake_with_grad,
    backward=autograd.scaled_backward,
    setup=autograd.setup_with_grad,
    vmap=autograd.vmap_with_grad,
)
register(
    schema.backward_op,
    fake=schema.fake_backward,
    backward=autograd.no_double_backward,
    vmap=autograd.vmap_backward,
)


@serves("linear_cross_entropy")
def _explain(
    x: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    device: str | None = None,
) -> Choice:
    op = "linear_cross_entropy"
    if target is None:
        target = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    options = ("mean", -100, 0.0, 0.0, 0.0, 1.0, 0.0)
    check(schema.Problem(x, weight, target, bias, *[None] * 4, *options))
    place = device or ("cpu" if x.device.type == "meta" else x.device.type)
    m, v = math.prod(x.shape[:-1]), weight.shape[0]
    config = {"chunk": min(m, chunked.chunk_rows(m, v, x.element_size()))}
    if target.is_floating_point():
        return Choice.of(op, f"reference.{op}", "class probabilities: by chunks", config)
    if place == "cpu" and machine.extension is not None:
        kernel = machine.extension.choose_linear_cross_entropy(checks.short(x.dtype))
        reason = f"own pass over chunks of {config['chunk']} tokens, torch's products"
        return Choice.of(op, kernel, reason, config)
    why = machine.extension_error if place == "cpu" else triton.why_not(x.dtype, place)
    if place != "cpu" and not why:
        return triton.explain_chunk(place, x.dtype, v, config)
    return Choice.of(op, f"reference.{op}", why, config)
