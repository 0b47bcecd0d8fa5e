"""`bigops explain`: kernel, config and reason for one call."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from bigops.cli.arguments import fraction, positive

if TYPE_CHECKING:
    from torch import Tensor

HELP = "kernel, config and reason for one call"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, integer = parser.add_argument, positive(int)
    add("op", help="an op, such as fused_linear")
    add("--m", type=integer, default=64, help="rows of x; of attention: queries; of rotary: tokens")
    add("--k", type=integer, help="input features; of attention and rotary: columns of a head")
    add(
        "--n",
        type=integer,
        help="output features; of attention: keys; of rotary: columns that turn",
    )
    add("--dtype", choices=("fp32", "bf16", "fp16", "fp64"), default="fp32")
    add("--activation", default="none")
    add("--rank", type=integer, help="of low_rank_linear (default: a quarter of the smaller side)")
    add("--sparsity", type=fraction, help="of sparse_linear's weight (default: 0.8, or of N:M)")
    add("--pattern", default="1x4", help="of sparse_linear's weight: 1x4, 16x16, 1x1, 2:4, 2:4t")
    add("--values", help="sparse_linear stores int8, bf16 or fp32; low_rank_linear's factors: int8")
    add("--device", help="cpu, cuda, or a GPU that need not be here: sm_90, gfx942 (default: cpu)")


def run(args: argparse.Namespace) -> int:
    import torch

    import bigops
    from bigops.benches.harness import DTYPES

    if args.n is None or args.k is None:
        raise ValueError("--k and --n: expected the layer's input and output features")
    dtype = DTYPES[args.dtype]
    x = torch.randn(args.m, args.k, device="cpu").to(dtype)
    gated = args.activation in ("swiglu", "geglu", "geglu_tanh", "reglu")
    weight = torch.randn(args.n * (1 + gated), args.k, device="cpu").to(dtype)
    if args.op in ("fused_adamw", "fused_sgd", "fused_grad_norm"):
        print(bigops.explain(args.op, [weight], device=args.device))
        return 0
    if args.op in ("norm", "norm_act_quant", "norm_with_sum"):
        print(bigops.explain(args.op, x, residual=x, device=args.device))
        return 0
    if args.op == "attention":
        q, k = ((1, 1, length, args.k) for length in (args.m, args.n))
        print(bigops.explain(args.op, q, k, dtype=dtype, device=args.device))
        return 0
    if args.op == "rotary":
        heads, table = (1, 1, args.m, args.k), (1, args.m, args.n)
        print(bigops.explain(args.op, heads, table, dtype=dtype, device=args.device))
        return 0
    if args.op == "quantized_embedding":
        ids = torch.zeros(args.m, dtype=torch.int64, device="cpu")
        rows = bigops.formats.QuantizedWeight.from_dense(weight)
        print(bigops.explain(args.op, ids, rows, dtype, device=args.device))
        return 0
    options = {"activation": args.activation, "device": args.device}
    stored = _stored(args, weight)
    try:
        print(bigops.explain(args.op, x, *stored, **options))
    except TypeError as error:  # a --dtype that the op does not take
        raise ValueError(str(error)) from error
    return 0


def _stored(args: argparse.Namespace, weight: Tensor) -> tuple[Any, ...]:
    """The weight as the op takes it: one tensor or weight in a format, or two factors."""
    import bigops

    whole: dict[str, Any] = {
        "packed_linear": bigops.formats.PackedWeight,
        "quantized_linear": bigops.formats.QuantizedWeight,
        "fp8_linear": bigops.formats.Fp8Weight,
    }
    if args.op in whole:
        return (whole[args.op].from_dense(weight),)
    if args.op == "low_rank_linear":
        rank = min(args.rank or -(-min(args.n, args.k) // 4), args.n, args.k)
        factors = weight.new_zeros(args.n, rank), weight.new_zeros(rank, args.k)
        if args.values not in (None, "int8"):
            raise ValueError(
                f"--values: expected int8, or none for factors of --dtype; got {args.values!r}"
            )
        return (
            tuple(map(bigops.formats.QuantizedWeight.from_dense, factors))
            if args.values
            else factors
        )
    if args.op == "sparse_linear":
        from bigops.formats.patterns import Pattern
        from bigops.formats.sparse import VALUES, SparseWeight
        from bigops.nn.sparse_linear import check_sparsity

        pattern = Pattern.parse(args.pattern)
        values = VALUES[SparseWeight.form(args.values or "int8")["values"]]
        mask = pattern.mask(weight, check_sparsity(args.sparsity, pattern))
        return (SparseWeight.from_mask(weight, mask, values, (pattern.height, pattern.width)),)
    return (weight,)
