"""What `bigops tune --device cuda` runs: each form of each op's kernel on random data of a shape.

A maker gives (form and bucket, as kernels/common/tuned.py names them, and a function that makes the
data and gives the call of one tile on it). Forms that a shape cannot have are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bigops.kernels.common import tuned
from bigops.kernels.common.tiles import TileConfig

Call = Callable[[TileConfig | None], object]  # None: the tile that serves
Problem = tuple[str, str, Callable[[], Call]]

RANKS = (16, 64, 128)
BLOCKS = (16, 32)
BLOCKS_KEPT = 0.2
GROUP = 64
# kind in the config files -> what `QuantizedWeight.from_dense` is given
KINDS: dict[str, dict[str, object]] = {
    "w8a8": {},
    "w4a8": {"bits": 4, "group": GROUP, "activations": "dynamic"},
    "w8": {"group": GROUP},
    "w4": {"bits": 4, "group": GROUP},
}
_PLAIN, _SWIGLU = "none", "swiglu"


def _tensor(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)


def _aligned(*sizes: int) -> bool:
    return all(size % 16 == 0 for size in sizes)


def dense(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> Iterator[Problem]:
    """fused_linear: x [m, k] times W [n, k] or [2n, k]."""
    from bigops.kernels import fused_linear as kernels
    from bigops.kernels.common.activation import NAMES

    def make(rows: int, activation: str) -> Call:
        x, weight = _tensor(device, dtype, m, k), _tensor(device, dtype, rows, k)
        bias, code = _tensor(device, dtype, rows), NAMES.index(activation)
        return lambda config: kernels.forward(x, weight, bias, None, code, False, config)

    for form, rows, activation in (("plain", n, _PLAIN), ("gated", 2 * n, _SWIGLU)):
        name = tuned.form_of(form, _aligned(n, k))
        yield name, tuned.bucket(m, n, k), partial(make, rows, activation)


def low_rank(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> Iterator[Problem]:
    """low_rank_linear: factors of each rank of `RANKS`, alone and beside a base."""
    from bigops.kernels.common.form_tiles import table_for
    from bigops.kernels.common.tiles import device_arch
    from bigops.kernels.low_rank_linear import kernel as kernels
    from bigops.kernels.low_rank_linear import model

    room = table_for(model.OP, device_arch(device)).shared_memory

    def make(rank: int, based: bool) -> Call:
        x, u = _tensor(device, dtype, m, k), _tensor(device, dtype, n, rank)
        v, bias = _tensor(device, dtype, rank, k), _tensor(device, dtype, n)
        base = _tensor(device, dtype, n, k) if based else None

        def call(config: TileConfig | None) -> object:
            used = model.shared_bytes(config, rank, based, dtype.itemsize) if config else 0
            if used > room:  # the model would not take it, however fast it is
                raise ValueError(f"config: expected {room} bytes of shared memory; got {used}")
            return kernels.forward(x, u, v, bias, None, base, config=config)

        return call

    for rank in RANKS:
        for based in (False, True):
            if rank <= min(n, k) and (rank <= model.LOOSE or _aligned(n, k)):
                width = model.padded_rank(rank)
                form = tuned.form_of(model.form_of(based), _aligned(n, k), width)
                yield form, tuned.bucket(m), partial(make, rank, based)


def sparse(device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> Iterator[Problem]:
    """sparse_linear: blocks of each side of `BLOCKS`, forward and both gradients."""
    from bigops.formats.patterns import block_mask
    from bigops.formats.sparse import SparseWeight
    from bigops.kernels.sparse_linear import launch as kernels
    from bigops.ops.family import Call as LinearCall
    from bigops.ops.sparse_linear.triton import blocks_of

    if dtype == torch.float16:  # values are float32 then, whose tiles serve
        return

    def make(side: int, form: str) -> Call:
        weight = _tensor(device, torch.float32, n, k)
        mask = block_mask(weight, 1 - BLOCKS_KEPT, (side, side))
        stored = SparseWeight.from_mask(weight, mask, dtype, (side, side))
        x, gz = _tensor(device, dtype, m, k), _tensor(device, dtype, m, n)
        blocks, why = blocks_of(LinearCall(x, stored), x.device)
        if blocks is None:
            raise ValueError(why)
        values = stored.values
        if form == "forward":
            return lambda config: kernels.forward(x, values, blocks, n, config=config)
        if form == "transposed":
            return lambda config: kernels.transposed(gz, values, blocks, k, config)
        return lambda config: kernels.sampled(gz, x, values, blocks, config)

    for side in BLOCKS:
        for form in ("forward", "transposed", "sampled"):
            if n >= side and k >= side:
                name = tuned.form_of(form, _aligned(n, k), side)
                yield name, tuned.bucket(m), partial(make, side, form)


def quantized(
    device: torch.device, dtype: torch.dtype, m: int, n: int, k: int
) -> Iterator[Problem]:
    """quantized_linear: int8 and int4 weights, activations quantised or as they are."""
    from bigops.formats.quantized import QuantizedWeight
    from bigops.kernels.quantized_linear import forward as kernels

    def make(kind: str) -> Call:
        x, bias = _tensor(device, dtype, m, k), _tensor(device, dtype, n)
        w = QuantizedWeight.from_dense(_tensor(device, torch.float32, n, k), **KINDS[kind])  # type: ignore[arg-type]
        stored = (w.values, w.scale, w.zero_point, w.row_sum, w.x_qparams)
        form = (w.n, w.bits, w.group, w.activations)
        return lambda config: kernels.forward(x, *stored, *form, bias, config=config)

    for kind in KINDS:
        if k % GROUP == 0 or not KINDS[kind]:
            aligned = _aligned(n) and (kind.endswith("a8") or _aligned(k))
            yield tuned.form_of(kind, aligned), tuned.bucket(m), partial(make, kind)


PROBLEMS: dict[str, Callable[[torch.device, torch.dtype, int, int, int], Iterator[Problem]]] = {
    "fused_linear": dense,
    "low_rank_linear": low_rank,
    "sparse_linear": sparse,
    "quantized_linear": quantized,
}
