"""The `bigops` command.

A subcommand is a file with HELP, `add_arguments` and `run`, which imports all that is heavy.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence

from bigops.cli import bench, demo, doctor, explain, recipe, show, tune

COMMANDS = {
    "demo": demo,
    "recipe": recipe,
    "bench": bench,
    "tune": tune,
    "doctor": doctor,
    "explain": explain,
    "show": show,
}
MISUSE = 2  # a user's mistake, as argparse has it
INTERRUPTED = 130  # 128 + SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    0 done, 1 a floor was breached, 2 a mistake in the request (one line on stderr says which),
    130 interrupted. With ``--debug`` a mistake keeps its traceback.
    """
    args = parser().parse_args(argv)
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


class _Version(argparse.Action):
    """Looks the version up when it is asked for, and leaves nothing in the namespace."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import bigops

        print(f"bigops {bigops.__version__}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    parser = argparse.ArgumentParser(
        prog="bigops", description="Smaller and truly faster PyTorch models, with a receipt."
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        of = commands.add_parser(name, help=command.HELP)
        command.add_arguments(of)
        of.set_defaults(command=command.run)
    return parser
