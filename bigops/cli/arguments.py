"""Types of arguments, and the option that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """A number of ``kind`` (int or float) above 0."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind("0")
        if not value > 0 or value == float("inf"):
            raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
        return value

    return parse


def fraction(text: str) -> float:
    """A number from 0 up to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 up to below 1, got {text!r}")
    return value


def shape(text: str) -> tuple[int, int, int]:
    """M,N,K of a product."""
    try:
        m, n, k = map(int, text.split(","))
    except ValueError:
        m = n = k = 0
    if min(m, n, k) < 1:
        raise argparse.ArgumentTypeError(f"expected M,N,K of at least 1 each, got {text!r}")
    return m, n, k


def add_threads(parser: argparse.ArgumentParser) -> None:
    """The option --threads; `set_threads` obeys it."""
    what = "CPU threads (default: torch's choice)"
    parser.add_argument("--threads", type=positive(int), metavar="N", help=what)


def set_threads(args: argparse.Namespace) -> None:
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
