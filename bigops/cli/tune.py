"""`bigops tune`: measure this machine or its GPU, and keep it."""

from __future__ import annotations

import argparse

from bigops.cli.arguments import add_threads, set_threads, shape

HELP = "measure this machine or its GPU, and keep it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="cpu", help="cpu: crossovers; cuda or cuda:N: tiles of the GPU kernels")
    add("--op", action="append", metavar="NAME", help="of the GPU kernels; repeatable (all)")
    add("--shapes", nargs="+", type=shape, metavar="M,N,K", help="of the GPU kernels' products")
    add("--dtype", action="append", choices=("fp32", "bf16", "fp16"), help="repeatable (all)")
    add("--again", action="store_true", help="measure what the file already has, too")
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    from bigops import tune

    set_threads(args)
    if args.device != "cpu":
        return _tune_gpu(args)
    if args.op or args.shapes:
        raise ValueError("--op, --shapes: expected with --device cuda only; the device is cpu")
    dtypes = [name.replace("fp", "f") for name in args.dtype or ("fp32", "bf16", "fp16")]
    path = tune.tune(dtypes, again=args.again, report=lambda line: print(line, flush=True))
    print(f"wrote {path}; it serves from the next start of Python on")
    return 0


def _tune_gpu(args: argparse.Namespace) -> int:
    from bigops.tune import gpu as tune_gpu

    target = tune_gpu.target_of(args.device)
    path = tune_gpu.tune(
        target,
        args.op or tune_gpu.OPS,
        args.shapes or tune_gpu.SHAPES,
        [name.replace("fp", "f") for name in args.dtype or ("bf16", "fp16", "fp32")],
        again=args.again,
        report=lambda line: print(line, flush=True),
    )
    print(f"wrote {path}; it serves from the next start of Python on")
    return 0
