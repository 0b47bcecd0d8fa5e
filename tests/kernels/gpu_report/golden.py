"""The committed table of compiled GPU kernels: what a row was compiled from, and what got worse.

Each row carries two digests of what decides its machine code. ``digest`` is of what is written: the
kernel's source with all that it calls, the types and constants of the compilation, the options, the
device and triton's version; all rows take a second. ``ir`` is of what the back end gets: the
intermediate code after triton's first stage, without places in files, and the options with their
defaults; a row takes 40 ms. That stage inlines what a kernel calls and hoists its constants, whose
order does not count: so it is the same whichever function of which file holds a line. While either
is that of its row, compiling again gives what the row says. So a source that moved (to a function
of its own, by a branch that this kernel does not take, or an option that was the default) costs a
row that stage alone, and CI compiles a sample and the rows whose intermediate code has moved; all
take half an hour of two cores.
"""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction

GOLDEN = Path(__file__).parents[2] / "golden" / "gpu_report.csv"
TRITON = "3.9.0"  # that compiled the table
KEY = ("arch", "kernel", "form", "dtype", "tile", "activation", "precision")
Row = Mapping[str, Any]
_PATHS = ("extern_libs",)  # options that name files of this installation; they come with triton


def digest(source: Any, target: Any, options: Mapping[str, Any]) -> str:
    """Of a compilation: `triton.compiler.ASTSource`, `GPUTarget`, the options given to compile.

    Comments, docstrings and the place of a function in its file do not count.
    """
    constants = {
        str(name): _text(value)
        for name, value in sorted(source.constants.items(), key=lambda item: str(item[0]))
    }
    parts = [triton.__version__, str(target), repr(sorted(options.items()))]
    parts += [
        repr(sorted(source.signature.items())),
        repr(constants),
        repr(sorted(source.attrs.items())),
    ]
    parts += _sources(source.fn)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def ir_digest(source: Any, target: Any, options: Mapping[str, Any]) -> str:
    """Of what triton's first stage makes of the same arguments, and of the resolved options."""
    backend = make_backend(target)
    resolved = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target,
        resolved,
        backend.get_codegen_implementation(resolved),
        backend.get_module_map(),
        context,
    )
    stages: dict[str, Any] = {}
    backend.add_stages(stages, resolved, source.language)
    module = stages["ttir"](module, {})
    values = {name: value for name, value in vars(resolved).items() if name not in _PATHS}
    code = _without_order_of_constants(module.str_nodebug())
    parts = [triton.__version__, str(target), repr(sorted(values.items())), code]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _without_order_of_constants(code: str) -> str:
    """``code`` with each constant where it is used, not at the head of the function."""
    defined = r"^\s*(%\w+) = (arith\.constant .*)\n"
    constants = dict(re.findall(defined, code, re.MULTILINE))
    code = re.sub(defined, "", code, flags=re.MULTILINE)
    return re.sub(r"%[a-z]\w*", lambda name: constants.get(name[0], name[0]), code)


def _text(value: Any) -> str:
    return "\n".join(_sources(value)) if isinstance(value, JITFunction) else repr(value)


@functools.cache
def _sources(root: Any) -> tuple[str, ...]:
    """The code of a kernel, of every kernel function it calls, and the plain values they use."""
    todo, seen, found = [root], set(), set()
    while todo:
        fn = todo.pop()
        if id(fn) in seen:
            continue
        seen.add(id(fn))
        tree = ast.parse(textwrap.dedent(fn.src))
        body = tree.body[0].body  # type: ignore[attr-defined]
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]
        found.add(ast.dump(tree))
        for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
            value = fn.__globals__.get(name)
            if isinstance(value, JITFunction):
                todo.append(value)
            elif isinstance(value, int | float | str | triton.language.constexpr):
                found.add(f"{name} = {value!r}")
    return tuple(sorted(found))


def read(path: Path = GOLDEN) -> list[dict[str, str]]:
    """The committed table, one dict per row."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """A table as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def by_key(rows: Sequence[Row]) -> dict[tuple[str, ...], Row]:
    """Rows by what names them."""
    return {tuple(str(row[name]) for name in KEY): row for row in rows}


def regressions(rows: Sequence[Row], golden: Sequence[Row]) -> list[str]:
    """What is worse in ``rows`` than in ``golden``: a missing row, fewer programs, lost MMAs."""
    known = by_key(golden)
    worse = []
    for key, row in by_key(rows).items():
        name = " ".join(key)
        if key not in known:
            worse.append(f"{name}: not in the golden table; write it anew")
            continue
        before = known[key]
        if int(row["programs_per_sm"]) < int(before["programs_per_sm"]):
            worse.append(
                f"{name}: programs_per_sm {before['programs_per_sm']} -> {row['programs_per_sm']}"
            )
        for count in ("mma", "wgmma", "tcgen05", "mfma", "cp_async"):
            if int(before[count]) > 0 and int(row[count]) == 0:
                worse.append(f"{name}: {count} {before[count]} -> 0")
    return worse
