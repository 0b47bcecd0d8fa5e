"""`bigops bench`: the ops against torch and rivals."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bigops.cli.arguments import add_threads, positive, set_threads

if TYPE_CHECKING:
    from bigops.benches.rows import Row

HELP = "measure ops, or whole models, against torch and rivals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", action="append", metavar="NAME", help="an op; repeatable (default: all)")
    model = "a whole model: minilm, bert-base .., module:factory, or a folder; repeatable"
    add("--model", action="append", metavar="MODEL", help=model)
    serve = "serve a model: random lengths, concurrent threads, cold start, memory"
    add("--serve", metavar="MODEL", help=serve)
    side = "with --model: only eager and the sides with TEXT in their name; repeatable"
    add("--side", action="append", default=[], metavar="TEXT", help=side)
    add("--no-accuracy", action="store_true", help="with --model: agreement alone, in less time")
    clock = "with --model: wall, or cpu with --threads 1, which others on the machine do not slow"
    add("--clock", choices=("wall", "cpu"), default="wall", help=clock)
    held = "hold all sides to an instruction set: avx2, avx512, avx512_vnni, avx512_bf16"
    add("--isa", metavar="LEVEL", help=held)
    add("--requests", type=positive(int), default=200, metavar="N", help="with --serve: a round's")
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
    _check(args)
    if args.isa:
        from bigops.benches.models import isa

        isa.hold(args.isa)  # before torch is loaded
    from bigops.benches import rows, summary
    from bigops.files import writable_target

    for path in filter(None, (args.csv, args.plot, args.summary)):
        writable_target(path)  # before minutes are spent on measuring
    if args.model or args.serve:
        return _whole(args)
    if args.from_json:
        found = rows.from_benchmark_json(args.from_json)
        print(rows.table(found))
    else:
        found = list(_measured(args))
    print(f"\n{summary.markdown(found)}")
    _write(args, found)
    if args.summary:
        summary.write(found, args.summary)
        print(f"wrote {args.summary}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Options that do not go together, before anything is loaded.

    Raises:
        ValueError: one is given that the others leave without meaning.
    """
    kinds = [flag for flag in ("op", "model", "serve", "from_json") if getattr(args, flag)]
    if len(kinds) > 1:
        raise ValueError(f"expected one of --op, --model, --serve, --from-json; got {kinds}")
    if args.side and not args.model:
        raise ValueError("--side: expected --model beside it")
    if (args.model or args.serve) and (args.summary or args.device != "cpu"):
        raise ValueError("--model, --serve: expected neither --summary nor --device")
    if args.serve and args.plot:
        raise ValueError("--serve: expected no --plot, which draws ratios to eager")


def _whole(args: argparse.Namespace) -> int:
    """Whole models: a table as soon as one is measured, and the files at the end."""
    from bigops.benches.models import measure, serve

    set_threads(args)
    found: list[Any] = []
    groups: Iterable[Sequence[Any]]
    table: Callable[[Any], str] = serve.table if args.serve else measure.table
    if args.serve:
        groups = serve.run(args.serve, requests=args.requests)
    else:
        groups = measure.run(
            args.model,
            sides=args.side,
            pairs=args.pairs,
            accuracy=not args.no_accuracy,
            clock=args.clock,
        )
    for group in groups:
        print(table(group), flush=True)
        found += group
    _write(args, found)
    return 0


def _write(args: argparse.Namespace, found: list[Any]) -> None:
    """The rows as the files that were asked for."""
    from bigops.benches import plots, rows

    if args.csv:
        rows.write_csv(found, args.csv)
        print(f"wrote {args.csv}")
    if args.plot:
        for written in plots.plot(found, args.plot):
            print(f"wrote {written}")


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
