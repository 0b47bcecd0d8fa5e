"""The loop of `linear_cross_entropy` over chunks of tokens; the products are torch's.

What it holds beyond its results is one chunk of logits (an eighth of all) and two small blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bigops.backend import machine
from bigops.ops.linear_cross_entropy.reference import accumulation

CHUNKS = 8  # of the tokens: each adds a pass over the accumulator of the weight's gradient
SMALL = 1 << 20  # bytes of logits that are not worth cutting up
BLOCK_SHARE = 0.02  # of all logits that the blocks of a product may take
# (logits, their rows, row factor, with gradient) -> losses; turns the logits into their gradient
Pass = Callable[[Tensor, slice, Tensor | None, bool], Tensor]
Needs = tuple[bool, bool, bool]
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def chunk_rows(m: int, v: int, itemsize: int) -> int:
    """Tokens of one chunk: an eighth of them, or more where their logits are small."""
    return max(1, -(-m // CHUNKS), min(m, SMALL // max(1, v * itemsize)))


def block_columns(m: int, v: int, k: int, rows: int, dtype: torch.dtype) -> int:
    """Classes of one block, which holds gradients, weights and their product with x; twice, since
    oneDNN packs fp32 and bf16 is added up in fp32; fp16 is widened first."""
    copies = 4 if dtype == torch.float16 else 2
    share = int(BLOCK_SHARE * m * v / max(1, copies * (k + rows)))
    return max(32, min(2048, share // 32 * 32))


def _onednn(dtype: torch.dtype, x: Tensor, weight: Tensor) -> bool:
    """Whether fp32 products go to oneDNN: on AMD CPUs twice as fast as MKL behind torch.mm."""
    return (
        dtype == torch.float32
        and x.device.type == "cpu"
        and min(*x.shape, *weight.shape) > 0
        and machine.float_product() == "onednn"
    )


class Products:
    """The three products of a chunk: x W^T, G W, and G^T x added to a wide accumulator.

    fp16 is multiplied in fp32, block by block: torch's fp16 product is 5 to 10 times slower on
    CPUs without AVX512-FP16.
    """

    def __init__(self, x: Tensor, weight: Tensor, rows: int) -> None:
        self.weight = weight
        self.widens = x.dtype == torch.float16 and x.device.type == "cpu"
        self.dtype = torch.float32 if self.widens else x.dtype
        self.onednn = _onednn(self.dtype, x, weight)
        self.blocked = self.onednn or self.widens
        self.v, self.k = weight.shape
        self.step = block_columns(x.shape[0], self.v, self.k, rows, x.dtype)

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, self.v, self.step):
            yield slice(start, min(start + self.step, self.v))

    def _times(self, a: Tensor, b: Tensor) -> Tensor:
        """a b^T for a [m, k] and b [n, k] of any strides."""
        if self.onednn:
            return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")  # type: ignore[no-any-return]
        return torch.mm(a, b.t())

    def logits(self, x: Tensor, out: Tensor) -> None:
        """out [m, V] = x W^T."""
        if not self.blocked:
            torch.mm(x, self.weight.t(), out=out)
            return
        x = x.to(self.dtype)
        for block in self._blocks():
            out[:, block] = self._times(x, self.weight[block].to(self.dtype))

    def for_x(self, grads: Tensor, out: Tensor) -> None:
        """out [m, K] = G W."""
        if not self.blocked:
            torch.mm(grads, self.weight, out=out)
            return
        total: Tensor | None = None
        for block in self._blocks():
            part = self._times(
                grads[:, block].to(self.dtype), self.weight[block].to(self.dtype).t()
            )
            total = part if total is None else total.add_(part)
            del part  # before the next one is made
        out.copy_(torch.zeros_like(out) if total is None else total)

    def for_weight(self, grads: Tensor, x: Tensor, total: Tensor, first: bool) -> None:
        """total [V, K] += G^T x in the accumulator's dtype; = for the first chunk."""
        x = x.to(self.dtype)
        for block in self._blocks():
            part = self._times(grads[:, block].to(self.dtype).t(), x.t())
            if first:
                total[block] = part
            else:
                total[block].add_(part.to(total.dtype))  # add_ of mixed dtypes takes twice as long
            del part


def in_rows(one_pass: Pass) -> Pass:
    """A pass in plain torch, by an eighth of the rows, so that what it makes stays small."""

    def passes(logits: Tensor, rows: slice, factor: Tensor | None, learns: bool) -> Tensor:
        m = logits.shape[0]
        losses, step = [], max(1, -(-m // CHUNKS))
        for start in range(0, m, step):
            part = slice(start, min(start + step, m))
            scale = None if factor is None else factor[part]
            own = slice(rows.start + part.start, rows.start + part.stop)
            losses.append(one_pass(logits[part], own, scale, learns))
        return torch.cat(losses)

    return passes


def run(
    x: Tensor,
    weight: Tensor,
    one_pass: Pass,
    scale: Tensor | float,
    needs: Needs,
) -> tuple[Tensor, Grads]:
    """Losses [M], and gradients of x, weight and bias (not those that are not needed).

    Args:
        x: [M, K], weight: [V, K].
        one_pass: the pass over a chunk of logits.
        scale: factor of the gradients, of all tokens or one each ([M] in the accumulation dtype).
        needs: which of the gradients of x, weight and bias are made. Those of weight and bias come
            in the accumulation dtype.
    """
    m, v = x.shape[0], weight.shape[0]
    wide = accumulation(x.dtype)
    rows = chunk_rows(m, v, x.element_size())
    x, weight = x.contiguous(), weight.contiguous()
    products = Products(x, weight, min(rows, m))
    losses = x.new_empty(m, dtype=wide)
    grad_x = torch.empty_like(x) if needs[0] else None
    make = x.new_empty if m else x.new_zeros
    grad_weight = make(weight.shape, dtype=wide) if needs[1] else None
    grad_bias = x.new_zeros(v, dtype=wide) if needs[2] else None
    buffer = x.new_empty(min(rows, m), v)
    learns = any(needs)
    factors = scale if isinstance(scale, Tensor) else None
    if learns and factors is None and scale != 1:
        factors = torch.full((m,), float(scale), dtype=wide, device=x.device)
    for start in range(0, m, rows):
        part = slice(start, min(start + rows, m))
        logits = buffer[: part.stop - part.start]
        products.logits(x[part], logits)
        factor = None if factors is None else factors[part]
        losses[part] = one_pass(logits, part, factor, learns)
        if grad_x is not None:
            products.for_x(logits, grad_x[part])
        if grad_weight is not None:
            products.for_weight(logits, x[part], grad_weight, start == 0)
        if grad_bias is not None:
            grad_bias.add_(logits.sum(0, dtype=wide))
    return losses, (grad_x, grad_weight, grad_bias)
