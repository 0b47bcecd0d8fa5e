"""Run what README.md shows, keep what it printed in readme_output.json, and write it there.

    make readme                        all of it: the Python blocks, `make demo`, `make test`
    make readme ARGS="blocks"          one part; the others stay as they were
    python docs/readme_output.py --check    run nothing: is README.md what would be written?

Under a heading of README.md stand at most one ``python`` fence and one ``text`` fence, which holds
what was printed: by that block, or by the command that the heading names. A line that begins with
``*Run of`` says when and where. Nothing else is touched. A block that fails, a floor that the demo
does not hold, or a red suite writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
README, KEPT = ROOT / "README.md", ROOT / "docs" / "readme_output.json"
PICTURE = ROOT / "docs" / "receipt.png"
# The parts, each with the heading under which its line of date and machine stands.
PARTS = {"blocks": "Use", "demo": "make demo", "test": "make test"}
SIDE_BY_SIDE = 2  # blocks at a time


class Ran(NamedTuple):
    """How a block ended, and what it printed."""

    code: int
    out: str
    error: str


def sections(text: str) -> Iterator[tuple[str, str]]:
    """(heading without its marks, everything from that heading to the next) in order."""
    for part in re.split(r"^(?=#{2,3} )", text, flags=re.MULTILINE):
        head = re.match(r"#+ (.*)", part)
        yield (head[1].replace("`", "") if head else "", part)


def blocks(text: str) -> dict[str, str]:
    """The Python of README.md by heading.

    Raises:
        ValueError: two blocks or two outputs under one heading, or one heading twice.
    """
    found: dict[str, str] = {}
    for name, part in sections(text):
        for kind in ("python", "text"):
            if len(re.findall(rf"^```{kind}$", part, re.MULTILINE)) > 1:
                raise ValueError(f"{name}: expected one {kind} fence under a heading; got more")
        code = re.search(r"^```python\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
        if code and name in found:
            raise ValueError(f"{name}: expected one heading of that name; got more")
        if code:
            found[name] = code[1]
    return found


# --- running -------------------------------------------------------------------------------------

# Fork costs milliseconds where an import of torch costs seconds. Nothing has used torch's threads
# before the fork, and each block has a namespace, a folder and random numbers of its own.
_PARENT = """
import json, linecache, os, sys, traceback
import torch, torch._dynamo
jobs, side_by_side = json.load(sys.stdin), int(sys.argv[1])

def child(folder, name, code):
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "error")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    status = 1
    try:
        linecache.cache[name] = len(code), None, code.splitlines(True), name
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as leave:
        print(leave.code, file=sys.stderr)
        status = 0 if leave.code in (None, 0) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

running, codes = {}, {}
def wait():
    pid, status = os.wait()
    codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
for folder, (name, code) in jobs.items():
    if len(running) == side_by_side:
        wait()
    pid = os.fork()
    if not pid:
        child(folder, f"<{name}>", code)
    running[pid] = folder
while running:
    wait()
json.dump(codes, sys.stdout)
"""


def run_blocks(codes: dict[str, str], side_by_side: int = SIDE_BY_SIDE) -> dict[str, Ran]:
    """Run blocks, each in a process and an empty folder of its own, two at a time."""
    with tempfile.TemporaryDirectory(prefix="readme-") as scratch:
        folders = {name: Path(scratch) / str(i) for i, name in enumerate(codes)}
        for folder in folders.values():
            folder.mkdir()
        jobs = {str(folders[name]): (name, code) for name, code in codes.items()}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, "-c", _PARENT, str(side_by_side)],
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "100"},
        )
        if done.returncode:
            raise RuntimeError(f"the blocks' parent process failed: {done.stderr}")
        ended = json.loads(done.stdout)
        return {
            name: Ran(
                ended[str(folder)], (folder / "out").read_text(), (folder / "error").read_text()
            )
            for name, folder in folders.items()
        }


def absent(code: str) -> str | None:
    """A package that a block imports and that is not installed here."""
    roots = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)
    return next((root for root in roots if importlib.util.find_spec(root) is None), None)


def _blocks(before: dict[str, list[str]]) -> tuple[dict[str, list[str]], str]:
    """What each block printed, run one at a time, as their times are shown; and what was not run.

    Args:
        before: of the last run; a block whose package is not installed keeps its output.
    """
    codes = blocks(README.read_text())
    idle = [name for name, code in codes.items() if absent(code)]
    found = run_blocks({n: c for n, c in codes.items() if n not in idle}, side_by_side=1)
    for name, ran in found.items():
        if ran.code:
            raise SystemExit(f"{name}: ended with {ran.code}:\n{ran.error}")
    lines = {name: tidy(ran.out) for name, ran in found.items()}
    said = f"; not run again: {', '.join(idle)}" if idle else ""
    return {n: before[n] if n in idle else lines[n] for n in codes}, said


def _demo() -> list[str]:
    """The transcript of the demo; docs/receipt.png is its picture."""
    with tempfile.TemporaryDirectory(prefix="readme-") as folder:
        out = Path(folder) / "demo-out"
        text = _said([sys.executable, "-m", "bigops", "demo", "--out", "demo-out"], cwd=folder)
        shutil.copyfile(out / "receipt.png", PICTURE)
    return tidy(few_steps(text))


def few_steps(text: str) -> str:
    """Of the lines of a progress bar, the first and the last."""
    lines, kept = text.splitlines(), []
    is_step = [line.lstrip().startswith("step ") for line in lines]
    for i, line in enumerate(lines):
        first = is_step[i] and not (i and is_step[i - 1])
        last = is_step[i] and not (i + 1 < len(lines) and is_step[i + 1])
        if not is_step[i] or first or last:
            kept.append(line)
        elif is_step[i - 1] and not (i > 1 and is_step[i - 2]):
            kept.append("  ...")
    return "\n".join(kept)


def _test() -> list[str]:
    return ends_of_suite(_said(["make", "test", "ARGS=", f"VENV={sys.prefix}"], cwd=ROOT))


def ends_of_suite(text: str) -> list[str]:
    """Of pytest's output the first line, the one with the number of tests, and the verdict."""
    lines = text.strip().splitlines()
    begin = next(i for i, line in enumerate(lines) if "test session starts" in line)
    told = re.compile(r"\d+ workers \[|collected \d+ items")
    count = next(line for line in lines[begin:] if told.search(line))
    return tidy("\n".join([lines[begin], count, "...", lines[-1]]))


def _said(command: list[str], cwd: str | Path) -> str:
    """What a command printed; its errors go on to the terminal."""
    print("$", *command, file=sys.stderr)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # a make below a make says which folder it enters and leaves
    own = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    env = {**own, "PYTHONPATH": path, "COLUMNS": "80"}
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{' '.join(command)}: ended with {done.returncode}")
    return done.stdout


def tidy(text: str) -> list[str]:
    """Printed lines as they are shown: no space at their end, and the longest wrapped."""
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    return [piece for line in lines for piece in _wrapped(line)]


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(line, 100, subsequent_indent=indent) if len(line) > 100 else [line]


def machine() -> str:
    """The machine of a run, in words."""
    import torch

    from bigops.backend import machine as here

    names = []
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    isa = here.extension.isa() if here.extension is not None else "no extension"
    cpu = names[0] if names else "a CPU"
    return f"{os.cpu_count()} cores of {cpu} ({isa}), torch {torch.__version__}"


# --- writing -------------------------------------------------------------------------------------


def outputs_of(kept: dict[str, Any]) -> dict[str, str]:
    """What was printed, by heading."""
    found = {PARTS[part]: kept[part]["lines"] for part in ("demo", "test")}
    return {name: "\n".join(lines) for name, lines in {**found, **kept["blocks"]["lines"]}.items()}


def render(text: str, kept: dict[str, Any]) -> str:
    """README.md with the kept outputs in its ``text`` fences and the lines of date and machine.

    Raises:
        ValueError: a fence that nothing fills, or an output that finds no fence.
    """
    outputs = {name: out for name, out in outputs_of(kept).items() if out}
    runs = {PARTS[part]: kept[part]["run"] for part in PARTS}
    written = []
    for name, part in sections(text):
        fence = re.search(r"(?<=^```text\n).*?(?=^```$)", part, re.MULTILINE | re.DOTALL)
        if fence and name not in outputs:
            raise ValueError(f"{name}: expected an output for its text fence; nothing is printed")
        if fence:
            part = f"{part[: fence.start()]}{outputs.pop(name)}\n{part[fence.end() :]}"
        if name in runs:
            line = f"*Run of {runs.pop(name)}.*"
            part, count = re.subn(r"^\*Run of .*\*$", line, part, flags=re.MULTILINE)
            if count != 1:
                raise ValueError(f"{name}: expected one line that begins with '*Run of'")
        written.append(part)
    if outputs or runs:
        raise ValueError(f"expected a text fence and a line under {[*outputs, *runs]}")
    return "".join(written)


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are named, or all, and write; with --check only compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; or all")
    parser.add_argument("--check", action="store_true", help="run nothing, compare README.md")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"expected parts of {', '.join(PARTS)}; got {', '.join(unknown)}")
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    text = README.read_text()
    if args.check:
        if render(text, kept) == text:
            return 0
        print("README.md is not what docs/readme_output.py would write", file=sys.stderr)
        return 1
    for part in args.parts or PARTS:
        said = ""
        if part == "blocks":
            shown, said = _blocks(kept.get(part, {}).get("lines", {}))
        elif part == "demo":
            shown = _demo()
        else:
            shown = _test()
        run = f"{date.today().isoformat()} on {machine()}{said}"
        kept[part] = {"run": run, "lines": shown}
    written = render(text, kept)  # before anything is written: it may find no place
    KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    README.write_text(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
