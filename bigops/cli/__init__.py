"""The `bigops` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigops.benches.rows import Row

MISUSE = 2  # a user's mistake, as argparse has it
INTERRUPTED = 130  # 128 + SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    0 done, 1 a floor was breached, 2 a mistake in the request (one line on stderr says which),
    130 interrupted. With ``--debug`` a mistake keeps its traceback.
    """
    args = _parser().parse_args(argv)
    try:
        code = args.command(args)
        sys.stdout.flush()
        return int(code)
    except KeyboardInterrupt:
        print("bigops: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader (head, less) left; point stdout elsewhere so that the flush at exit is quiet
        with contextlib.suppress(io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if args.debug:
            raise
        print(f"bigops: {_one_line(error)}", file=sys.stderr)
        return MISUSE


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"needs the package {error.name!r}, which is not installed here ({error})"
    return " ".join(str(error).split())


# --- commands ----------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    from bigops.recipes import demo

    _set_threads(args.threads)
    return demo.main(args)


def _doctor(args: argparse.Namespace) -> int:
    import bigops
    from bigops.cli import doctor

    report = bigops.report()
    if args.json:
        import json

        print(json.dumps(report, indent=2))
    else:
        print(doctor.text(report))
    return 0


def _tune(args: argparse.Namespace) -> int:
    from bigops import tune

    _set_threads(args.threads)
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


def _bench(args: argparse.Namespace) -> int:
    from bigops.benches import plots, rows, summary
    from bigops.files import writable_target

    for path in filter(
        None, (args.csv, args.plot, args.summary)
    ):  # before minutes are spent on measuring
        writable_target(path)
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
    from bigops.benches import harness, rows

    _set_threads(args.threads)
    shown: list[rows.Row] = []
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


def _explain(args: argparse.Namespace) -> int:
    import torch

    import bigops
    from bigops.benches.harness import DTYPES

    if args.n is None or args.k is None:
        raise ValueError("--k and --n: expected the layer's input and output features")
    dtype = DTYPES[args.dtype]
    x = torch.randn(args.m, args.k, device="cpu").to(dtype)
    gated = args.activation in ("swiglu", "geglu", "geglu_tanh", "reglu")
    rows = 2 * args.n if gated else args.n
    weight = torch.randn(rows, args.k, device="cpu").to(dtype)
    packed: tuple[object, ...] = (weight,)
    if args.op in ("fused_adamw", "fused_sgd", "fused_grad_norm"):
        print(bigops.explain(args.op, [weight], device=args.device))
        return 0
    if args.op == "packed_linear":
        from bigops.ops.packed_linear import pack_weight

        packed = (pack_weight(weight),)
    elif args.op == "low_rank_linear":
        rank = min(args.rank or -(-min(args.n, args.k) // 4), args.n, args.k)
        packed = (weight.new_zeros(args.n, rank), weight.new_zeros(rank, args.k))
        if args.values not in (None, "int8"):
            raise ValueError(
                f"--values: expected int8, or none for factors of --dtype; got {args.values!r}"
            )
        if args.values:
            from bigops.ops.quantized_linear import quantize_weight

            packed = tuple(quantize_weight(factor) for factor in packed)  # type: ignore[arg-type]
    elif args.op == "quantized_linear":
        from bigops.ops.quantized_linear import quantize_weight

        packed = (quantize_weight(weight),)
    elif args.op == "fp8_linear":
        from bigops.ops.fp8_linear import quantize_fp8

        packed = (quantize_fp8(weight),)
    elif args.op == "sparse_linear":
        from bigops.nn.sparse_linear import VALUES, check_sparsity, check_values
        from bigops.ops.sparse_linear import Pattern, sparsify_weight

        pattern = Pattern.parse(args.pattern)
        stored = VALUES[check_values(args.values or "int8")]
        mask = pattern.mask(weight, check_sparsity(args.sparsity, pattern))
        packed = (sparsify_weight(weight, mask, stored, (pattern.height, pattern.width)),)
    options = {"activation": args.activation, "device": args.device}
    try:
        print(bigops.explain(args.op, x, *packed, **options))
    except TypeError as error:  # a --dtype that the op does not take
        raise ValueError(str(error)) from error
    return 0


def _show(args: argparse.Namespace) -> int:
    from bigops.compress.store import load_compressed
    from bigops.nn import SparseLinear

    layers = load_compressed(args.model)
    if not layers:
        raise ValueError(f"{args.model}: expected a model with compressed layers; it has none")
    if args.layer is not None and args.layer not in layers:
        raise ValueError(f"--layer: expected one of {', '.join(layers)}; got {args.layer!r}")
    for name, layer in layers.items():
        if args.layer in (None, name):
            print(f"{name or 'the model'}: {layer}, {layer.nbytes:,} bytes")
            if isinstance(layer, SparseLinear):
                print(layer.storage().picture())
    return 0


# --- shared by commands ------------------------------------------------------------------------


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


# --- arguments ---------------------------------------------------------------------------------


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind("0")
        if not value > 0 or value == float("inf"):
            raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
        return value

    return parse


def _shape(text: str) -> tuple[int, int, int]:
    try:
        m, n, k = map(int, text.split(","))
    except ValueError:
        m = n = k = 0
    if min(m, n, k) < 1:
        raise argparse.ArgumentTypeError(f"expected M,N,K of at least 1 each, got {text!r}")
    return m, n, k


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 up to below 1, got {text!r}")
    return value


class _Version(argparse.Action):
    """Looks the version up when it is asked for, and leaves nothing in the namespace."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import bigops

        print(f"bigops {bigops.__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bigops", description="Smaller and truly faster PyTorch models, with a receipt."
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="train, compress, save, reload, compare"))
    _add_bench(commands.add_parser("bench", help="measure the ops against torch and rivals"))
    _add_tune(commands.add_parser("tune", help="measure this machine or its GPU, and keep it"))
    doctor = commands.add_parser("doctor", help="what this machine has, which kernel serves what")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    doctor.set_defaults(command=_doctor)
    _add_explain(commands.add_parser("explain", help="kernel, config and reason for one call"))
    show = commands.add_parser("show", help="the compressed layers of a saved model, as pictures")
    show.add_argument("model", metavar="MODEL", help="a file written by bigops.save")
    show.add_argument("--layer", metavar="NAME", help="only this one")
    show.set_defaults(command=_show)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add, integer, number = parser.add_argument, _positive(int), _positive(float)
    add("--data", choices=("mnist", "fashion-mnist", "digits"), default="mnist")
    add("--target-speedup", type=number, default=3.0, metavar="X", help="against eager fp32")
    add("--max-drop", type=number, default=0.5, metavar="POINTS", help="test accuracy given up")
    add("--batch", type=integer, default=64, metavar="N", help="batch size latency is measured at")
    add("--epochs", type=integer, metavar="N", help="training epochs (default: by data set)")
    add("--seed", type=int, default=0)
    add("--precision", choices=("fp32", "bf16-mixed", "fp16-mixed"), default="bf16-mixed")
    add("--threads", type=integer, metavar="N", help="CPU threads (default: torch's choice)")
    add("--out", default="demo-out", metavar="DIR", help="where receipt and model are written")
    add(
        "--no-latency-floor",
        action="store_true",
        help="report a missed latency target without failing (shared machines)",
    )
    add("--quick", action="store_true", help="fewer steps and timing rounds: a smoke test")
    parser.set_defaults(command=_demo)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add, integer = parser.add_argument, _positive(int)
    add("--op", action="append", metavar="NAME", help="an op; repeatable (default: all)")
    add("--quick", action="store_true", help="only the few cases marked quick")
    add("--match", default="", metavar="TEXT", help="only cases whose id has TEXT in it")
    add("--device", default="cpu", help="cpu, or cuda where torch sees a GPU")
    add("--threads", type=integer, metavar="N", help="CPU threads (default: torch's choice)")
    add("--pairs", type=integer, default=30, metavar="N", help="interleaved rounds per case")
    add("--csv", metavar="FILE", help="write the rows as CSV")
    add("--plot", metavar="FILE", help="write the speed-ups, one PNG per op (FILE-op.png)")
    add("--summary", metavar="FILE", help="write where we stand against the best rival (Markdown)")
    add("--from-json", metavar="FILE", help="take rows from `pytest benches --benchmark-json`")
    parser.set_defaults(command=_bench)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="cpu", help="cpu: crossovers; cuda or cuda:N: tiles of the GPU kernels")
    add("--op", action="append", metavar="NAME", help="of the GPU kernels; repeatable (all)")
    add("--shapes", nargs="+", type=_shape, metavar="M,N,K", help="of the GPU kernels' products")
    add("--dtype", action="append", choices=("fp32", "bf16", "fp16"), help="repeatable (all)")
    add("--again", action="store_true", help="measure what the file already has, too")
    add("--threads", type=_positive(int), metavar="N", help="CPU threads (default: torch's choice)")
    parser.set_defaults(command=_tune)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    add, integer = parser.add_argument, _positive(int)
    add("op", help="an op, such as fused_linear")
    add("--m", type=integer, default=64, help="rows of x")
    add("--k", type=integer, help="input features")
    add("--n", type=integer, help="output features")
    add("--dtype", choices=("fp32", "bf16", "fp16", "fp64"), default="fp32")
    add("--activation", default="none")
    add("--rank", type=integer, help="of low_rank_linear (default: a quarter of the smaller side)")
    add("--sparsity", type=_fraction, help="of sparse_linear's weight (default: 0.8, or of N:M)")
    add("--pattern", default="1x4", help="of sparse_linear's weight: 1x4, 16x16, 1x1, 2:4, 2:4t")
    add("--values", help="sparse_linear stores int8, bf16 or fp32; low_rank_linear's factors: int8")
    parser.add_argument(
        "--device", help="cpu, cuda, or a GPU that need not be here: sm_90, gfx942 (default: cpu)"
    )
    parser.set_defaults(command=_explain)
