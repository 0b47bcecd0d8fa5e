"""`bigops bench`: the ops against torch and rivals."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bigops.cli.arguments import add_threads, positive, set_threads

if TYPE_CHECKING:
    from bigops.benches.rows import Row

HELP = "measure the ops against torch and rivals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", action="append", metavar="NAME", help="an op; repeatable (default: all)")
    add("--quick", action="store_true", help="only the few cases marked quick")
    add("--match", default="", metavar="TEXT", help="only cases whose id has TEXT in it")
    add("--device", default="cpu", help="cpu, or cuda where torch sees a GPU")
    add_threads(parser)
    rounds = "interleaved rounds per case"
    add("--pairs", type=positive(int), default=30, metavar="N", help=rounds)
    add("--csv", metavar="FILE", help="write the rows as CSV")
    add("--plot", metavar="FILE", help="write the speed-ups, one PNG per op (FILE-op.png)")
    add("--summary", metavar="FILE", help="write where we stand against the best rival (Markdown)")
    add("--from-json", metavar="FILE", help="take rows from `pytest benches --benchmark-json`")


def run(args: argparse.Namespace) -> int:
    from bigops.benches import plots, rows, summary
    from bigops.files import writable_target

    for path in filter(None, (args.csv, args.plot, args.summary)):
        writable_target(path)  # before minutes are spent on measuring
    if args.from_json:
        found = rows.from_benchmark_json(args.from_json)
        print(rows.table(found))
    else:
        found = list(_measured(args))
    print(f"\n{summary.markdown(found)}")
    if args.csv:
        rows.write_csv(found, args.csv)
        print(f"wrote {args.csv}")
    if args.plot:
        for written in plots.plot(found, args.plot):
            print(f"wrote {written}")
    if args.summary:
        summary.write(found, args.summary)
        print(f"wrote {args.summary}")
    return 0


def _measured(args: argparse.Namespace) -> Iterator[Row]:
    """The rows, and the table of each case on the screen as soon as it is measured."""
    from bigops.benches import harness, rows

    set_threads(args)
    shown: list[Row] = []
    for row in harness.run(
        args.op or harness.op_names(),
        quick=args.quick,
        match=args.match,
        device=args.device,
        pairs=args.pairs,
    ):
        if shown and row.case_key != shown[0].case_key:
            print(rows.table(shown), flush=True)
            shown = []
        shown.append(row)
        yield row
    print(rows.table(shown), flush=True)
