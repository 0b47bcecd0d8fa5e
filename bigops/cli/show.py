"""`bigops show`: the compressed layers of a saved model, as pictures."""

from __future__ import annotations

import argparse

HELP = "the compressed layers of a saved model, as pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a file written by bigops.save")
    parser.add_argument("--layer", metavar="NAME", help="only this one")


def run(args: argparse.Namespace) -> int:
    from bigops.compress.store import load_compressed

    layers = load_compressed(args.model)
    if not layers:
        raise ValueError(f"{args.model}: expected a model with compressed layers; it has none")
    if args.layer is not None and args.layer not in layers:
        raise ValueError(f"--layer: expected one of {', '.join(layers)}; got {args.layer!r}")
    for name, layer in layers.items():
        if args.layer in (None, name):
            print(f"{name or 'the model'}: {layer}, {layer.nbytes:,} bytes")
            picture = layer.picture()
            if picture is not None:
                print(picture)
    return 0
