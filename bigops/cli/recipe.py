"""`bigops recipe`: train on real data, from one command to a figure."""

from __future__ import annotations

import argparse

from bigops.cli.arguments import add_threads, positive, set_threads
from bigops.recipes.catalog import RECIPES, lines

HELP = "train on real data: a table of recipes, or one of them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", nargs="?", choices=tuple(RECIPES), metavar="NAME", help="without it: the table")
    add("--seed", type=int, default=0)
    add("--epochs", type=positive(int), metavar="N", help="instead of the recipe's own number")
    add("--minutes", type=positive(float), metavar="M", help="leave off then, to be resumed")
    add("--precision", default="fp32", help="fp32, bf16-mixed, fp16-mixed; mnist: apex's O0 to O2")
    add("--out", metavar="DIR", help="where results are written (default: recipe-NAME)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    if args.name is None:
        print("\n".join(lines()))
        return 0
    from pathlib import Path

    from bigops.recipes.run import carry_out

    set_threads(args)
    return carry_out(
        args.name,
        Path(args.out or f"recipe-{args.name}"),
        seed=args.seed,
        epochs=args.epochs,
        precision=args.precision,
        minutes=args.minutes,
        resume=args.resume,
    )
