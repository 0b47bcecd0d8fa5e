"""Calls of every op, forward and backward, and the bytes that stay allocated after many of them."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bigops
from bigops.formats.bitmap import BitmapWeight
from bigops.formats.quantize import static_qparams
from bigops.formats.sparse import SparseWeight
from bigops.ops.low_rank_linear import low_rank_linear
from bigops.ops.sparse_linear.sparse24_pack import prune24

Call = Callable[[], Any]


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def counted() -> bool:
    """Whether this C library has mallinfo2: glibc from 2.33 on."""
    return hasattr(ctypes.CDLL(None), "mallinfo2")


def allocated() -> int:
    """Bytes that malloc has given out and not got back."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _MallInfo
    return int(libc.mallinfo2().uordblks)


def kept(call: Call, calls: int) -> float:
    """Bytes that each of ``calls`` calls leaves allocated, after some that fill caches."""
    for _ in range(50):
        call()
    gc.freeze()  # what is there already need not be looked through again
    gc.collect()
    before = allocated()
    for _ in range(calls):
        call()
    gc.collect()
    after = allocated()
    gc.unfreeze()
    return (after - before) / calls


def _both(f: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    """Forward and backward, gradients dropped."""
    leaf = x.clone().requires_grad_()

    def call() -> None:
        f(leaf).sum().backward()  # type: ignore[no-untyped-call]
        leaf.grad = None

    return call


def _refused(call: Call) -> Call:
    def refused() -> None:
        try:
            call()
        except (ValueError, RuntimeError):
            return
        raise AssertionError("the call was expected to be refused")

    return refused


def linear_forms() -> dict[str, Callable[[Tensor], Tensor]]:
    """The linear ops on small weights, each a function of x [3, 16]."""
    torch.manual_seed(0)
    w, pair, bias = torch.randn(16, 16), torch.randn(32, 16), torch.randn(16)
    u, v, target = torch.randn(16, 4), torch.randn(4, 16), torch.randint(0, 16, (3,))
    packed, int8 = (
        bigops.formats.PackedWeight.from_dense(w),
        bigops.formats.QuantizedWeight.from_dense(w),
    )
    sparse = SparseWeight.from_dense(w, torch.int8)
    int4 = bigops.formats.QuantizedWeight.from_dense(w, bits=4, group=32)
    fp8, weight24 = (
        bigops.formats.Fp8Weight.from_dense(w),
        prune24(torch.randn(16, 64), dtype=torch.bfloat16),
    )
    bitmap = BitmapWeight.from_sparse(SparseWeight.from_dense(w))
    return {
        "fused_linear": lambda x: bigops.fused_linear(x, w, bias, None, "gelu"),
        "fused_linear_gated": lambda x: bigops.fused_linear(x, pair, None, None, "swiglu"),
        "fused_linear_none": lambda x: bigops.fused_linear(x, w),
        "packed_linear": lambda x: bigops.packed_linear(x, packed, bias, None, "silu"),
        "quantized_linear_int8": lambda x: bigops.quantized_linear(x, int8, bias, None, "relu"),
        "quantized_linear_int4": lambda x: bigops.quantized_linear(x, int4, bias, None, "gelu"),
        "fp8_linear": lambda x: bigops.fp8_linear(x, fp8, bias, None, "gelu"),
        "sparse_linear": lambda x: bigops.sparse_linear(x, sparse, bias, None, "tanh"),
        "sparse24_linear": lambda x: bigops.sparse_linear(x.repeat(1, 4).bfloat16(), weight24),
        "bitmap_linear": lambda x: bigops.sparse_linear(x, bitmap, bias, None, "gelu"),
        "low_rank_linear": lambda x: low_rank_linear(x, u, v, bias, None, "gelu", base=w),
        "linear_cross_entropy": lambda x: bigops.linear_cross_entropy(x, w, target, bias),
        "linear_cross_entropy_none": lambda x: bigops.linear_cross_entropy(
            x, w, target, reduction="none"
        ),
        "linear_cross_entropy_stats": lambda x: (
            bigops.linear_cross_entropy(x, w, target, bias, return_stats=True).loss
        ),
        "linear_js_div": lambda x: bigops.linear_js_div(x, w, x, w, bias),
    }


@functools.cache
def calls() -> dict[str, Call]:
    """Every op: forward, forward with backward, and what is no linear layer of float rows."""
    torch.manual_seed(1)
    x, w = torch.randn(3, 16), torch.randn(16, 16)
    found: dict[str, Call] = {}
    for name, f in linear_forms().items():
        found[name] = lambda f=f: f(x)  # type: ignore[misc]
        found[f"{name}, backward"] = _both(f, x)
    qparams, sparse = static_qparams(-3.0, 5.0), SparseWeight.from_dense(w, torch.int8)
    static = bigops.formats.QuantizedWeight.from_dense(w, activations="static", x_qparams=qparams)
    dense = SparseWeight.from_dense(w)
    large, square = torch.randn(256, 64), torch.randn(64, 64)
    found |= {
        "quantized_linear, qparams": lambda: bigops.quantized_linear(x, static, y_qparams=qparams),
        "sparse_linear, qparams": lambda: bigops.sparse_linear(
            x, sparse, x_qparams=qparams, y_qparams=qparams
        ),
        "sparse_linear, values": _both(
            lambda v: bigops.sparse_linear(x, dense.replace(values=v)), dense.values
        ),
        "fused_linear, a library": lambda: bigops.fused_linear(large, square),
        "fused_linear, a library, backward": _both(
            lambda t: bigops.fused_linear(t, square, None, None, "relu"), large
        ),
        "fused_linear, words": lambda: torch.ops.bigops.fused_linear(x, w, None, None, "gelu"),
        "fused_linear, refused": _refused(lambda: bigops.fused_linear(x, w[:, :3])),
    }
    for name, make in {
        "fused_adamw": lambda p: bigops.train.AdamW(p),
        "fused_adamw, 8-bit": lambda p: bigops.train.AdamW(p, eight_bit=True),
        "fused_sgd": lambda p: bigops.train.SGD(p, momentum=0.9),
    }.items():
        params = [torch.randn(8, 8).requires_grad_(), torch.randn(5).requires_grad_()]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer: Any = make(params)  # type: ignore[no-untyped-call]
        found[name] = lambda optimizer=optimizer: optimizer.step_checked(clip_norm=1.0)
    return found
