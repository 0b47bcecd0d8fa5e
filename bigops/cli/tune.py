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
    from bigops.tune import tune

    set_threads(args)
    given = {"ops": args.op, "shapes": args.shapes}
    if args.device == "cpu" and any(given.values()):
        raise ValueError("--op, --shapes: expected with --device cuda only; the device is cpu")
    if args.dtype:
        given["dtypes"] = [name.replace("fp", "f") for name in args.dtype]
    path = tune(
        args.device,
        **{name: value for name, value in given.items() if value},
        again=args.again,
        report=lambda line: print(line, flush=True),
    )
    print(f"wrote {path}; it serves from the next start of Python on")
    return 0
