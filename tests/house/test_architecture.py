"""The house keeps its shape: imports run one way, files stay short, one stem names an op.

Everything is read by `ast`, nothing is executed, and every check is shown to fail on a planted
violation in a small tree of its own.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (".py", ".cpp", ".h", ".inl", ".cu", ".cuh")
LONG = 450  # lines of a file that looks for its seam
MOST_FILES = 18  # of one folder; about 15 are meant

# Room -> rooms it may import. Not listed: every room may import itself and the leaves.
LEAVES = {"backend", "timing", "files", "_C"}
BELOW_OPTIM = {"kernels", "formats", "ops", "nn", "graph"}
BELOW_RECIPES = {*BELOW_OPTIM, "optim", "train", "compress", "parallel"}
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "formats": {"kernels"},
    "ops": {"kernels", "formats"},
    "nn": {"kernels", "formats", "ops"},
    "graph": {"kernels", "formats", "ops", "nn"},
    "optim": BELOW_OPTIM,
    "train": {*BELOW_OPTIM, "optim"},
    "compress": {*BELOW_OPTIM, "optim"},
    "parallel": {*BELOW_OPTIM, "optim"},
    "recipes": BELOW_RECIPES,
    "benches": BELOW_RECIPES,  # beside recipes: measures what stands below both
    "tune": {"formats", "ops", "kernels"},  # measures them for this machine
    "cli": {*BELOW_RECIPES, "recipes", "benches", "tune"},
    "__main__": {"cli"},
    "": BELOW_RECIPES,  # bigops/__init__.py re-exports
}
KERNELS_MAY_IMPORT = {"torch", "triton", "bigops"}

Check = Callable[[Path], list[str]]


# --- the checks ------------------------------------------------------------------------------


def python_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted module, file) of the package; kernels and benches as the modules they become."""
    for folder in ("bigops", "kernels", "benches"):
        for file in sorted((root / folder).rglob("*.py")):
            parts = list(file.relative_to(root).with_suffix("").parts)
            if folder != "bigops":
                parts.insert(0, "bigops")
            elif len(parts) > 1 and parts[1] in ("kernels", "benches"):
                continue  # the same files through the symlink
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported(module: str, file: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, inside a function) of every import, relative ones resolved."""
    tree = ast.parse(file.read_text())
    lazy = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, id(node) in lazy
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{name}.{alias.name}", id(node) in lazy


def wrong_imports(root: Path) -> list[str]:
    """Imports that run against the order of the rooms."""
    found = []
    for module, file in python_files(root):
        room = room_of(module)
        where = file.relative_to(root)
        if room not in MAY_IMPORT and room not in LEAVES:
            found.append(f"{where}: the room {room!r} is not in the plan of the house")
            continue
        for line, name, lazy in imported(module, file):
            top, *rest = name.split(".")
            if room == "kernels" and not lazy and top not in KERNELS_MAY_IMPORT:
                if top not in sys.stdlib_module_names:
                    found.append(f"{where}:{line}: kernels import {name}")
                continue
            if top != "bigops" or not rest:
                continue
            other = rest[0]
            if other not in MAY_IMPORT and other not in LEAVES:
                continue  # a name of bigops/__init__.py itself, such as __version__
            allowed = other == room or other in MAY_IMPORT.get(room, set())
            if not (allowed or (other in LEAVES and room != "kernels")):
                found.append(f"{where}:{line}: {room or 'bigops'} imports {name}")
    return found


def long_files(root: Path) -> list[str]:
    """Source files that had better become a folder of the same name: a warning, no failure."""
    return [
        f"{file.relative_to(root)}: {lines} lines; make it a folder"
        for file in tracked(root)
        if file.suffix in SOURCES and (lines := len(file.read_text().splitlines())) > LONG
    ]


def full_folders(root: Path) -> list[str]:
    """Folders of the house with more files than a person takes in at a glance."""
    found = [file for _, file in python_files(root)]
    found += [file for file in tracked(root) if file.suffix == ".py" and in_tests(root, file)]
    files = Counter(file.parent for file in found if file.name != "__init__.py")
    return [
        f"{folder.relative_to(root)}: {count} files; make folders in it"
        for folder, count in files.items()
        if count > MOST_FILES and folder.name not in ("benches", "faults")
    ]


def borrowed_privates(root: Path) -> list[str]:
    """Names with a leading underscore that come from another folder."""
    found = []
    for module, file in python_files(root):
        folder = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for line, name, _ in imported(module, file):
            home, _, leaf = name.rpartition(".")
            private = any(part[:1] == "_" and part[:2] != "__" for part in name.split("."))
            inside = home in (folder, module) or home.rpartition(".")[0] == folder
            if name.startswith("bigops.") and private and leaf != "_C" and not inside:
                found.append(f"{file.relative_to(root)}:{line}: imports {name}")
    return found


ARGUMENTS = {"args", "rest", "fixed", "inputs", "arguments", "given"}


def argument_slices(root: Path) -> list[str]:
    """Slices of arguments by position: names say what an argument is."""
    return [
        f"{file.relative_to(root)}:{node.lineno}: {ast.unparse(node)}"
        for module, file in python_files(root)
        if room_of(module) != "benches"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Slice)
        and isinstance(node.value, ast.Name)
        and node.value.id in ARGUMENTS
    ]


def newer_syntax(root: Path) -> list[str]:
    """Python files that Python 3.10 could not parse."""
    found = []
    for file in tracked(root):
        if file.suffix == ".py":
            try:
                ast.parse(file.read_text(), feature_version=(3, 10))
            except SyntaxError as error:
                found.append(f"{file.relative_to(root)}:{error.lineno}: {error.msg}")
    return found


SQUEEZED = re.compile(r"# fmt: (off|skip)\s*$")


def squeezed_lines(root: Path) -> list[str]:
    """Lines that the formatter is kept from, with no reason behind it."""
    return [
        f"{file.relative_to(root)}:{number}: {line.strip()}"
        for file in tracked(root)
        if file.suffix == ".py" and "faults" not in file.parts
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if SQUEEZED.search(line)
    ]


# Written in two halves so that this file passes its own check.
MACHINE_PATHS = re.compile("|".join(("/" + "work/", "/" + "farm/", "/" + "home/", "/" + "root/")))


def machine_paths(root: Path) -> list[str]:
    """Lines with a path of somebody's machine."""
    found = []
    for file in tracked(root):
        try:
            lines = file.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{file.relative_to(root)}:{number}: {line.strip()}"
            for number, line in enumerate(lines, 1)
            if MACHINE_PATHS.search(line)
        ]
    return found


def unplaced_tensors(root: Path) -> list[str]:
    """Calls of torch's factories without device=: they make a tensor on the default device.

    benches/ is left out: nobody calls a benchmark under a default device of his own.
    """
    factories = {factory.__name__ for factory in _device_constructors()}
    return [
        f"{file.relative_to(root)}:{node.lineno}: {ast.unparse(node)}"
        for module, file in python_files(root)
        if room_of(module) != "benches"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in factories
        and not any(keyword.arg in ("device", None) for keyword in node.keywords)
    ]


def missing_stems(root: Path) -> list[str]:
    """Ops, which are the folders of bigops/ops, without a test or a bench of their stem."""
    found = []
    for folder in sorted((root / "bigops" / "ops").iterdir()):
        if not (folder / "__init__.py").exists() or folder.name == "family":  # which has no op
            continue
        for wanted in (f"tests/ops/{folder.name}/test_*.py", f"benches/bench_{folder.name}.py"):
            if not list(root.glob(wanted)):
                found.append(f"{folder.name}: {wanted} is missing")
    return found


# Folders of tests/ that are no room: of the whole house, what tests share, what they keep, and the
# suites with an entrance of their own.
BESIDE = {"house", "support", "golden", "gpu", "accept", "faults"}


def in_tests(root: Path, file: Path) -> tuple[str, ...]:
    """Where a file lies in tests/; empty for any other."""
    top, *rest = file.relative_to(root).parts
    return tuple(rest) if top == "tests" else ()


def misplaced_tests(root: Path) -> list[str]:
    """Files of tests/ in none of its folders, and tests whose folder the house does not have."""
    found = []
    for file in tracked(root):
        *folders, name = in_tests(root, file) or ("conftest.py",)
        where = Path(*folders)
        if not folders:
            if name not in ("__init__.py", "conftest.py"):
                found.append(f"tests/{name}: expected in the room that it is of, or in tests/house")
        elif folders[0] not in BESIDE and name.startswith("test_"):
            outside = folders[0] in ("csrc", "kernels", "benches") and (root / where).is_dir()
            if not outside and not (root / "bigops" / where).is_dir():
                found.append(f"tests/{where / name}: there is no bigops/{where}")
    return found


def unpacked_data(root: Path) -> list[str]:
    """Data files of the package that no package-data pattern carries into a wheel."""
    text = (root / "pyproject.toml").read_text()
    listed = re.search(r'^"\*"\s*=\s*\[(.*?)\]', text, re.MULTILINE | re.DOTALL)
    patterns = re.findall(r'"([^"]+)"', listed.group(1)) if listed else []
    return [
        str(file.relative_to(root))
        for file in tracked(root)
        if file.relative_to(root).parts[0] in ("bigops", "kernels", "benches")
        and file.suffix != ".py"
        and not any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)
    ]


def tracked(root: Path) -> list[Path]:
    """Regular files that git tracks or would track; in a tree without git, all of them."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    inside = (root / ".git").exists() and listing.returncode == 0
    names = [root / name for name in listing.stdout.split("\0") if name] if inside else None
    files = names if names is not None else sorted(root.rglob("*"))
    return [file for file in files if file.is_file() and not file.is_symlink()]


CHECKS: dict[str, Check] = {
    "imports": wrong_imports,
    "folders": full_folders,
    "privates": borrowed_privates,
    "slices": argument_slices,
    "squeezed": squeezed_lines,
    "syntax": newer_syntax,
    "paths": machine_paths,
    "devices": unplaced_tensors,
    "stems": missing_stems,
    "mirror": misplaced_tests,
    "data": unpacked_data,
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_tree_keeps_the_rule(name: str) -> None:
    assert CHECKS[name](ROOT) == []


def test_long_files_are_named(tmp_path: Path) -> None:
    plant(tmp_path, "csrc/cpu/one.cpp", "\n" * (LONG + 1))
    assert long_files(tmp_path) == [f"csrc/cpu/one.cpp: {LONG + 1} lines; make it a folder"]
    for line in long_files(ROOT):
        warnings.warn(line, stacklevel=1)


def test_a_full_folder_is_found(tmp_path: Path) -> None:
    for number in range(MOST_FILES + 1):
        plant(tmp_path, f"bigops/nn/file{number}.py", "")
    assert full_folders(tmp_path) == [f"bigops/nn: {MOST_FILES + 1} files; make folders in it"]


def test_the_tree_is_seen() -> None:
    """The checks above look at something: the rooms are found, and git's list is the tree."""
    rooms = {room_of(module) for module, _ in python_files(ROOT)}
    assert {"ops", "kernels", "benches", "cli", "backend"} <= rooms
    names = {str(file.relative_to(ROOT)) for file in tracked(ROOT)}
    assert {"setup.py", "bigops/cli/__init__.py", "bigops/py.typed", "Makefile"} <= names


def test_type_marker_and_symlinked_rooms() -> None:
    assert (ROOT / "bigops" / "py.typed").is_file()
    for name in ("kernels", "benches"):
        assert (ROOT / "bigops" / name).is_dir()
        assert not (ROOT / name / "__init__.py").exists(), f"{name} is a namespace package"


# --- each check fails on a planted violation -------------------------------------------------

PLANTED = {
    "imports up": ("imports", "bigops/ops/one.py", "from bigops import nn\n"),
    "imports up lazily": ("imports", "bigops/nn/a.py", "def f():\n    import bigops.compress\n"),
    "imports up relatively": ("imports", "bigops/nn/a.py", "from ..compress import plan\n"),
    "imports sideways": ("imports", "bigops/train/a.py", "import bigops.compress.plan\n"),
    "leaf imports a room": ("imports", "bigops/backend/a.py", "import bigops.ops\n"),
    "leaf imports a room lazily": (
        "imports",
        "bigops/backend/a.py",
        "def explain():\n    import bigops.ops\n",
    ),
    "kernel imports the package": ("imports", "kernels/a.py", "from bigops.ops import one\n"),
    "kernel imports a leaf": ("imports", "kernels/a.py", "from bigops import backend\n"),
    "kernel imports numpy": ("imports", "kernels/a.py", "import numpy\n"),
    "unknown room": ("imports", "bigops/utils.py", "x = 1\n"),
    "a private name of another folder": (
        "privates",
        "bigops/nn/a.py",
        "from bigops.ops.one import _two\n",
    ),
    "a private file of another folder": ("privates", "bigops/nn/a.py", "import bigops.ops._two\n"),
    "a squeezed line": ("squeezed", "bigops/nn/a.py", "x = [1,2]  # fmt: " + "skip\n"),
    "a slice of arguments": ("slices", "bigops/ops/one/a.py", "def f(*args):\n    g(args[1:3])\n"),
    "match is fine, type is not": ("syntax", "bigops/nn/a.py", "type X = int\n"),
    "except group": ("syntax", "bigops/nn/a.py", "try:\n    f()\nexcept* ValueError:\n    g()\n"),
    "a path": ("paths", "README.md", "see /ho" + "me/somebody/notes\n"),
    "a tensor on the default device": (
        "devices",
        "bigops/nn/a.py",
        "import torch\ntorch.ones(2)\n",
    ),
    "a number on it": ("devices", "kernels/a.py", "import torch\nx = 2 * torch.tensor([1]).t()\n"),
    "an op without test and bench": ("stems", "bigops/ops/two/__init__.py", "x = 1\n"),
    "a test in no room": ("mirror", "tests/test_two.py", ""),
    "a test of a room that is not there": ("mirror", "tests/utils/test_two.py", ""),
    "a test of an op that is not there": ("mirror", "tests/ops/two/test_values.py", ""),
    "an unlisted data file": ("data", "kernels/configs/h.toml", "x = 1\n"),
}


def small_tree(root: Path) -> Path:
    """A tree that passes every check."""
    good = {
        "pyproject.toml": '[tool.setuptools.package-data]\n"*" = ["*.json", "py.typed"]\n',
        "bigops/__init__.py": "from bigops.ops import one\n",
        "bigops/backend/__init__.py": "from bigops.backend import machine\n",
        "bigops/py.typed": "",
        "bigops/ops/__init__.py": "from bigops.ops import one\n",
        "bigops/ops/one/__init__.py": "from bigops import backend\nimport bigops.kernels as k\n",
        "bigops/nn/a.py": "from bigops import __version__\nfrom bigops.ops.one import k\n",
        "bigops/cli/__init__.py": "def demo():\n    from bigops.recipes import demo\n",
        "kernels/one.py": "import math\nimport torch\nfrom bigops.kernels import tiles\n",
        "kernels/configs/a.json": "{}\n",
        "benches/bench_one.py": "import bigops\nfrom bigops.benches import harness\n",
        "tests/ops/one/test_values.py": "",
    }
    for name, text in good.items():
        plant(root, name, text)
    return root


def plant(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.mark.parametrize("name", CHECKS)
def test_a_good_tree_passes(name: str, tmp_path: Path) -> None:
    assert CHECKS[name](small_tree(tmp_path)) == []


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_violation_is_found(fault: str, tmp_path: Path) -> None:
    check, file, text = PLANTED[fault]
    root = small_tree(tmp_path)
    plant(root, file, text)
    found = CHECKS[check](root)
    stem = Path(file).parent.name if file.endswith("__init__.py") else Path(file).stem
    assert found, f"{fault}: not found"
    assert all(stem in line for line in found), found
