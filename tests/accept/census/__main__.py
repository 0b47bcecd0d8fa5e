"""``python -m tests.accept.census``: every type, each in a process of its own -> census.json.

With ``--timm`` networks of timm -> census_timm.json, in an environment that has timm.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
from collections import Counter
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import bigops
from bigops.backend import machine
from tests.accept.census import tiny, verbs

FILES = Path(__file__).parent.parent
# A source has PACKAGE, FIRST (what to warm by), names() and build(name).
SOURCES = {"census.json": "transformers_types", "census_timm.json": "timm_networks"}


def run(source: ModuleType, kind: str, seconds: int = 40) -> dict[str, Any]:
    """The line of one type: a crash or a hang costs that one alone.

    Args:
        seconds: of the processor, after which it is given up; four times as many of the clock.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(source, kind, seconds, theirs))
    child.start()
    theirs.close()
    try:
        if not ours.poll(4 * seconds):
            return {"not built": f"timeout: {4 * seconds} s"}
        line: dict[str, Any] = ours.recv()
        return line
    except EOFError:
        child.join()
        if child.exitcode == -signal.SIGXCPU:
            return {"not built": f"timeout: {seconds} s of the processor"}
        return {"not built": f"crash: exit code {child.exitcode}"}
    finally:
        child.kill()
        child.join()


def _child(source: ModuleType, kind: str, seconds: int, out: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
    torch.set_num_threads(1)
    try:
        line = verbs.census(source.build(kind))
    except tiny.NotBuiltError as error:
        line = {"not built": str(error)}
    except Exception as error:
        line = {"not built": f"plain: {type(error).__name__}: {error}"[:200]}
    text = json.dumps(line)  # no path of this machine
    out.send(json.loads(re.sub(r"(/[\w.+-]+){2,}", "..", text)))


def summary(lines: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How many were built, why not, and the outcomes of each verb."""
    built = {kind: line for kind, line in lines.items() if "built" in line}
    found: dict[str, Any] = {
        "models": len(lines),
        "built": len(built),
        "not built": dict(
            Counter(
                line["not built"].partition(":")[0]
                for line in lines.values()
                if "built" not in line
            ).most_common()
        ),
        "fuse_ layers": sum(line.get("fuse_ layers", 0) for line in built.values()),
    }
    for verb in verbs.VERBS:
        outcomes = Counter(line[verb].partition(":")[0] for line in built.values())
        found[verb] = dict(outcomes.most_common())
    return found


def on(package: str) -> dict[str, Any]:
    """Date, versions and the kind of machine."""
    extension = machine.extension
    return {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "isas": list(extension.isas()) if extension else [],
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        package: importlib.metadata.version(package),
    }


def write(package: str, lines: dict[str, dict[str, Any]], path: Path) -> None:
    """Each model on a line of its own."""
    head = {"on": on(package), "summary": summary(lines)}
    body = ",\n".join(f'  "{kind}": {json.dumps(lines[kind])}' for kind in sorted(lines))
    text = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(f'{text},\n "models": {{\n{body}\n }}\n}}\n')


def warm(source: ModuleType) -> None:
    """Import once, for all children, what most models need.

    No backward: after one, torch refuses gradients in a forked child.
    """
    model = source.build(source.FIRST).model
    bigops.fuse_(model)
    bigops.compress_(model, bigops.Int8(), keep="all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="names of models; none: all of them")
    parser.add_argument("--timm", action="store_true", help="networks of timm")
    parser.add_argument("--json", type=Path, help="default: the committed file")
    parser.add_argument("--part", default="0/1", help="i/n: each n-th model from the i-th on")
    parser.add_argument("--again", action="store_true", help="only models that the file lacks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = "census_timm.json" if args.timm else "census.json"
    source = importlib.import_module(f"tests.accept.census.{SOURCES[file]}")
    path = args.json or FILES / file
    warm(source)
    lines = json.loads(path.read_text())["models"] if path.exists() else {}
    first, step = map(int, args.part.split("/"))
    for kind in args.kinds or source.names()[first::step]:
        if args.again and kind in lines:
            continue
        lines[kind] = run(source, kind)
        print(kind, json.dumps(lines[kind]), flush=True)
        write(source.PACKAGE, lines, path)
    print(json.dumps(summary(lines), indent=1))


if __name__ == "__main__":
    main()
