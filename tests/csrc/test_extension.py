"""The built extension: what it links to, what it keeps to itself, and its schemas."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bigops.graph.deploy.executor  # noqa: F401  (with bigops.ops, all ops there are)
from bigops.backend import machine
from tests.support.kernels_ran import needs_extension

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parents[1] / "golden" / "torch_2_10_shim_symbols.txt"
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (binutils) here")


def nm(*arguments: str) -> list[list[str]]:
    text = subprocess.run(["nm", *arguments], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in text.splitlines() if line.strip()]


def torch_symbols(undefined: list[str]) -> set[str]:
    return {name for name in undefined if re.match(r"(aoti_)?torch_", name)}


# ABI ---------------------------------------------------------------------------------------


@needs_extension
@needs_nm
def test_only_symbols_of_torch_2_10_are_used() -> None:
    assert machine.extension is not None
    undefined = [row[-1] for row in nm("-D", "--undefined-only", machine.extension.__file__)]
    known = set(GOLDEN.read_text().split())
    used = torch_symbols(undefined)
    assert "torch_call_dispatcher" in used
    assert used <= known, f"not in torch 2.10's stable ABI: {sorted(used - known)}"
    unstable = [name for name in undefined if re.match(r"_ZNK?(2at|3c10|5torch)", name)]
    assert not unstable, f"C++ symbols of libtorch, which no release keeps: {unstable}"


def test_a_newer_symbol_is_seen() -> None:
    """The planted fault: a shim that torch 2.11 added."""
    known = set(GOLDEN.read_text().split())
    assert not torch_symbols(["torch_from_blob_v2"]) <= known


# instruction sets --------------------------------------------------------------------------


def leaks(rows: list[list[str]]) -> list[str]:
    """Defined symbols that another file's copy may replace, or be replaced by."""
    return [row[-1] for row in rows if len(row) == 3 and row[1] in "WVu"]


def compile_object(source: Path, out: Path, flags: list[str]) -> Path:
    command = ["c++", "-std=c++17", "-O2", "-fPIC", *flags, f"-I{ROOT / 'csrc'}", "-c"]
    subprocess.run([*command, str(source), "-o", str(out)], check=True)
    return out


@needs_nm
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_instruction_set_files_keep_their_code_to_themselves(tmp_path: Path) -> None:
    """A weak symbol of an AVX-512 file may replace the baseline's copy and crash older CPUs."""
    sys.path.insert(0, str(ROOT))
    sources = sorted((ROOT / "csrc" / "cpu" / "simd").glob("a[mv]*.cpp"))
    assert sources
    flags = isa_flags()
    built = {path.stem: path for path in (ROOT / "build").glob("*/csrc/cpu/simd/*.o")}
    for source in sources:
        obj = built.get(source.stem) or compile_object(
            source, tmp_path / f"{source.stem}.o", flags[source.stem.split("_")[0]]
        )
        assert not leaks(nm("--defined-only", str(obj))), source.name
        assert not re.search(
            r"#include <(torch|vector|string|algorithm|memory)", source.read_text()
        )


def isa_flags() -> dict[str, list[str]]:
    text = (ROOT / "setup.py").read_text()
    table = re.search(r"ISA_FLAGS = (\{.*?\n\})", text, re.S)
    assert table is not None
    return dict(eval(table.group(1)))  # our own literal table


@needs_nm
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_a_leaking_template_is_seen(tmp_path: Path) -> None:
    """The planted fault: a template without an anonymous namespace."""
    source = tmp_path / "avx2_leak.cpp"
    source.write_text(
        "template <class T> __attribute__((noinline)) T twice(T x) { return x + x; }\n"
        "float use(float x) { return twice(x); }\n"
    )
    assert leaks(nm("--defined-only", str(compile_object(source, tmp_path / "leak.o", []))))


def in_subprocess(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )


SHOW = """
import torch, bigops
from bigops import backend
with backend.record() as names:
    bigops.fused_linear(torch.randn(2, 3), torch.randn(4, 3))
print(names)
"""


@needs_extension
def test_bigops_isa_lowers_the_level() -> None:
    shown = in_subprocess(SHOW, BIGOPS_ISA="portable")
    assert "cpu.portable.fused_linear.f32.dot" in shown.stdout, shown.stderr


@needs_extension
def test_an_unknown_bigops_isa_is_said_and_ignored() -> None:
    shown = in_subprocess(SHOW, BIGOPS_ISA="sse9")
    assert "BIGOPS_ISA: expected portable, avx2" in shown.stderr
    assert "got sse9" in shown.stderr
    assert ".fused_linear.f32.dot" in shown.stdout


@needs_extension
def test_set_isa_refuses_what_is_not_there() -> None:
    assert machine.extension is not None
    with pytest.raises(ValueError, match="isa: expected portable, .*; got avx10"):
        machine.extension.set_isa("avx10")


def test_without_the_extension_the_reference_serves_and_says_so() -> None:
    shown = in_subprocess(
        "import sys; sys.modules['bigops._C'] = None\n"
        + SHOW
        + """
print(bigops.explain('fused_linear', torch.randn(2, 3), torch.randn(4, 3)))
print(bigops.report()['ops']['fused_linear']['cpu'])
"""
    )
    lines = shown.stdout.splitlines()
    assert lines[0] == "['reference.fused_linear']", shown.stderr
    assert "not built" in lines[1]
    assert "not built" in lines[2]


@pytest.mark.slow
def test_without_a_compiler_the_install_is_pure_python(tmp_path: Path) -> None:
    """A copy of the tree, no compiler on the path: the build succeeds and says what it lacks."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("bigops", "csrc", "kernels", "benches"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": str(tmp_path / "nothing"), "HOME": str(tmp_path)},
    )
    assert built.returncode == 0, built.stderr
    assert "no C++ compiler found; installing in pure Python" in built.stderr
    assert not list((tmp_path / "bigops").glob("*.so"))


# schemas -----------------------------------------------------------------------------------

# The stable ABI checks only the arity of a kernel: a wrong type or order is a crash. A string is no
# argument of one: its copy is never freed.
CPP_TYPES = {
    "const Tensor&": "Tensor",
    "std::vector<Tensor>": "List[Tensor]",
    "std::vector<int64_t>": "List[int]",
    "Tensor": "Tensor",
    "const OptTensor&": "Optional[Tensor]",
    "bool": "bool",
    "int64_t": "int",
    "ScalarType": "int",  # as schemas have it
    "double": "float",
    "std::optional<double>": "Optional[float]",
}
IMPL = r'(?:m\.impl\(|implement\(m, )"([\w.]+)", TORCH_BOX\(&(?:\w+::)*(\w+)\)\)'
DEFINITION = r"(?:^|\n)((?:void|Tensor|std::vector<Tensor>|std::tuple<[\w, ]+>)) %s\(([^)]*)\)\s*\{"


def cpp_signature(text: str, function: str) -> tuple[list[tuple[str, str]], int] | None:
    """([(type, name)], number of results) of a kernel in C++ source."""
    found = re.search(DEFINITION % function, text)
    if found is None:
        return None
    result, arguments = found.groups()
    pairs = []
    for argument in re.sub(r"\s+", " ", arguments).split(","):
        kind, name = argument.strip().rsplit(" ", 1)
        pairs.append((CPP_TYPES[kind], name))
    return pairs, result.count("Tensor")


def kernels() -> list[tuple[str, str, str]]:
    """(op, C++ function, source text) of every registration in csrc/."""
    found = []
    for path in sorted((ROOT / "csrc").rglob("*.cpp")):
        text = path.read_text()
        for op, function in re.findall(IMPL, text):
            found.append((op, function, text))
    return found


def mismatch(op: str, function: str, text: str) -> str:
    signature = cpp_signature(text, function)
    if signature is None:
        return f"{function}: no definition that this test can read"
    arguments, results = signature
    schema = torch._library.utils.lookup_op(f"bigops::{op}")._schema
    want = [str(a.type) for a in schema.arguments]
    got = [kind for kind, _ in arguments]
    if want != got:
        return f"{op}: schema takes {want}, C++ takes {got}"
    if len(schema.returns) != results:
        return f"{op}: schema returns {len(schema.returns)}, C++ {results}"
    names = [a.name for a in schema.arguments]
    cpp_names = [re.sub(r"_any$", "", name) for _, name in arguments]
    return "" if names == cpp_names else f"{op}: schema names {names}, C++ names {cpp_names}"


@pytest.mark.parametrize(("op", "function", "text"), kernels(), ids=[k[0] for k in kernels()])
def test_schema_and_kernel_agree(op: str, function: str, text: str) -> None:
    assert not mismatch(op, function, text)


def test_every_op_has_a_cpu_kernel() -> None:
    registered = {op for op, _, _ in kernels()}
    ours = {name.split("::")[1] for name in torch.library._defs if name.startswith("bigops::")}
    forms = ("fused_linear", "fused_linear_with_parts", "fused_linear_backward")
    assert {f"{form}.code" for form in forms} <= registered
    assert registered <= ours


def test_swapped_arguments_are_seen() -> None:
    """The planted fault: two arguments of a kernel exchanged."""
    _, _, text = next(k for k in kernels() if k[0] == "fused_linear.code")
    wrong = text.replace(
        "Tensor fused_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias,",
        "Tensor fused_linear(const Tensor& x, const OptTensor& bias, const Tensor& weight,",
    )
    assert wrong != text
    assert "schema takes" in mismatch("fused_linear.code", "fused_linear", wrong)
