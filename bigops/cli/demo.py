"""`bigops demo`: train, compress, save, reload, compare."""

from __future__ import annotations

import argparse

from bigops.cli.arguments import add_threads, positive, set_threads

HELP = "train, compress, save, reload, compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, integer, number = parser.add_argument, positive(int), positive(float)
    add("--data", choices=("mnist", "fashion-mnist", "digits"), default="mnist")
    add("--target-speedup", type=number, default=3.0, metavar="X", help="against eager fp32")
    add("--max-drop", type=number, default=0.5, metavar="POINTS", help="test accuracy given up")
    add("--batch", type=integer, default=64, metavar="N", help="batch size latency is measured at")
    add("--epochs", type=integer, metavar="N", help="training epochs (default: by data set)")
    add("--seed", type=int, default=0)
    add("--precision", choices=("fp32", "bf16-mixed", "fp16-mixed"), default="bf16-mixed")
    add_threads(parser)
    add("--out", default="demo-out", metavar="DIR", help="where receipt and model are written")
    add(
        "--no-latency-floor",
        action="store_true",
        help="report a missed latency target without failing (shared machines)",
    )
    add("--quick", action="store_true", help="fewer steps and timing rounds: a smoke test")


def run(args: argparse.Namespace) -> int:
    from bigops.recipes import demo

    set_threads(args)
    return demo.main(args)
