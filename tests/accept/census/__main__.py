"""``python -m tests.accept.census``: every type, each in a process of its own -> census.json."""

from __future__ import annotations

import argparse
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
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import bigops
from bigops.backend import machine
from tests.accept.census import tiny, verbs

FILE = Path(__file__).parent.parent / "census.json"


def run(kind: str, seconds: int = 40) -> dict[str, Any]:
    """The line of one type: a crash or a hang costs that one alone.

    Args:
        seconds: of the processor, after which it is given up; four times as many of the clock.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(kind, seconds, theirs))
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


def _child(kind: str, seconds: int, out: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
    torch.set_num_threads(1)
    try:
        line = verbs.census(kind)
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
        "model types": len(lines),
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


def on() -> dict[str, Any]:
    """Date, versions and the kind of machine."""
    extension = machine.extension
    return {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "isas": list(extension.isas()) if extension else [],
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def write(lines: dict[str, dict[str, Any]], path: Path) -> None:
    """Each type on a line of its own."""
    head = {"on": on(), "summary": summary(lines)}
    body = ",\n".join(f'  "{kind}": {json.dumps(lines[kind])}' for kind in sorted(lines))
    text = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(f'{text},\n "types": {{\n{body}\n }}\n}}\n')


def warm() -> None:
    """Import once, for all children, what most models need.

    No backward: after one, torch refuses gradients in a forked child.
    """
    model = tiny.build("llama").model
    bigops.fuse_(model)
    bigops.compress_(model, bigops.Int8(), keep="all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="model types; none: all of them")
    parser.add_argument("--json", type=Path, default=FILE)
    parser.add_argument("--part", default="0/1", help="i/n: each n-th type from the i-th on")
    parser.add_argument("--again", action="store_true", help="only types that the file lacks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warm()
    lines = json.loads(args.json.read_text())["types"] if args.json.exists() else {}
    first, step = map(int, args.part.split("/"))
    for kind in args.kinds or tiny.model_types()[first::step]:
        if args.again and kind in lines:
            continue
        lines[kind] = run(kind)
        print(kind, json.dumps(lines[kind]), flush=True)
        write(lines, args.json)
    print(json.dumps(summary(lines), indent=1))


if __name__ == "__main__":
    main()
