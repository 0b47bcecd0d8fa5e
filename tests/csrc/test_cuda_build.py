"""bigops/_cuda as setup.py builds it: what it needs of torch, what its machine code is made of.

One build for all architectures, in a copy of the tree whose CPU extension is a stub (it is built
and tested elsewhere).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from csrc.cuda import nvcc
from tests.csrc.test_extension import GOLDEN, needs_nm, nm, torch_symbols
from tests.house.test_architecture import tracked

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(nvcc.compiler() is None, reason="no nvcc here"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here"),
]
# In libtorch_cuda, which the list of the CPU build's shims does not see; in torch since 2.1.
OF_CUDA = {"aoti_torch_get_current_cuda_stream"}
# Of each op: the main kernels and what they are called, the lesser ones, registers at most. Three
# blocks of 256 threads share the 65536 registers of a multiprocessor at 80 each, two at 128.
KERNELS = {
    # dtypes, bits, up to 8 and up to 16 rows; the sums of blocks that share K
    "quantized_linear": ("decode_linear", 3 * 2 * 2, 3, 80),
    # float words by dtype, bfloat16, int8, for 1, 4 and 16 rows; float and int8 sums by dtype
    "sparse_linear": ("sparse_sums", (3 + 1 + 1) * 3, 2 * 3, 128),
    # the step of all dtypes; the count of steps, sums of squares, the norm
    "fused_adamw": ("adamw_step", 1, 3, 80),
    # dtypes, for 1, 4 and 16 rows; the sums of blocks that share K
    "bitmap_linear": ("bitmap_decode", 3 * 3, 3, 160),
    # gradient of the values in bfloat16 and half
    "sparse24_gradient": ("sparse24_sampled", 2, 0, 128),
    # bfloat16 and half, y like them or float32, int8 by dtype, for 32 and 128 rows; two blocks of
    # 128 threads share
    "sparse24_linear": ("sparse24_product", (2 + 2 + 3) * 2, 0, 255),
    # dtypes of W by those of the values; the values of the transpose
    "sparse24_pack": ("sparse24_compress", 3 * 2, 2, 80),
}

# Of the kernels of sparse24_linear, by the mangled type of the values.
SPARSE_MMA = {
    "a": "IMMA.SP.16864.S8.S8",
    "6__half": "HMMA.SP.16832.F32",
    "13__nv_bfloat16": "HMMA.SP.16832.F32.BF16",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with bigops/_cuda built in place."""
    copy = tmp_path_factory.mktemp("tree")
    for file in tracked(ROOT):
        where = file.relative_to(ROOT)
        if where.parts[:2] in (("csrc", "cpu"),) or where.suffix == ".png":
            continue
        (copy / where).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy / where)
    for room in ("kernels", "benches"):
        (copy / "bigops" / room).symlink_to(Path("..") / room)
    for file in (copy / "csrc" / "common").glob("*.cpp"):
        file.unlink()
    stub = "#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_C, m) {}\n"
    (copy / "csrc" / "python.cpp").write_text(stub)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=copy,
        env={**os.environ, "BIGOPS_CUDA": "1", "BIGOPS_CUDA_ARCHS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return copy


@pytest.fixture(scope="module")
def library(tree: Path) -> Path:
    (found,) = (tree / "bigops").glob("_cuda*.so")
    return found


# ABI -------------------------------------------------------------------------------------------


@needs_nm
def test_only_symbols_of_torch_2_10_are_used(library: Path) -> None:
    undefined = [row[-1].split("@")[0] for row in nm("-D", "--undefined-only", str(library))]
    used, known = torch_symbols(undefined), set(GOLDEN.read_text().split())
    assert "torch_call_dispatcher" in used
    assert used - known == OF_CUDA
    assert not [name for name in undefined if re.match(r"_ZNK?(2at|3c10|5torch)", name)]
    assert not [name for name in undefined if re.match(r"cu(da)?[A-Z]", name)], "cudart is inside"


def test_it_links_to_no_cuda_library(library: Path) -> None:
    listing = subprocess.run(["objdump", "-p", str(library)], capture_output=True, text=True)
    needed = re.findall(r"NEEDED\s+(\S+)", listing.stdout)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "cuda" in name], needed


LOAD = """
import ctypes, sys, torch
library, stub, torch.version.cuda = sys.argv[1], sys.argv[2], sys.argv[3] or None
if stub:
    ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
sys.modules["bigops._C"] = None
import bigops, bigops.ops
from bigops.backend import machine
from bigops.formats import QuantizedWeight
print(machine.cuda_archs, machine.cuda_error)
decode = "bigops::quantized_linear_decode.code"
print(torch._C._dispatch_has_kernel_for_dispatch_key(decode, "CUDA"))
print(bigops.report()["cuda"]["kernels"])
x, w = torch.zeros(4, 64), QuantizedWeight.from_dense(torch.ones(8, 64), 4, 32)
print(bigops.explain("quantized_linear", x, w, device="sm_90").kernel)
"""


def load(tree: Path, library: Path, stub: str, version: str) -> list[str]:
    """What bigops says of its CUDA kernels where torch has ``version`` of CUDA."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(library), stub, version],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_is_loaded_only_where_torch_has_cuda(tree: Path, library: Path) -> None:
    archs, kernel, report, explained = load(tree, library, "", "")
    assert "need a torch that is built for CUDA" in archs
    assert kernel == "False"
    assert "need a torch" in report
    # which kernel a GPU would take can be said all the same
    assert explained == "cuda.quantized_linear.f32.w4"


def test_it_registers_its_kernels_where_torch_has_cuda(
    tree: Path, library: Path, tmp_path: Path
) -> None:
    """A stub stands for libtorch_cuda, of which the library needs the stream."""
    source, stub = tmp_path / "stub.c", tmp_path / "stub.so"
    source.write_text("int aoti_torch_get_current_cuda_stream(int d, void** s) { return 1; }\n")
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", source, "-o", stub], check=True)
    archs, kernel, report, _ = load(tree, library, str(stub), "13.0")
    assert archs == f"{nvcc.ARCHS!r} "
    assert kernel == "True"
    assert report == "loaded, for sm_80, sm_86, sm_89, sm_90a, sm_100a, sm_120"


def test_a_library_that_does_not_load_is_said(tree: Path, library: Path) -> None:
    """The planted fault: a torch that claims CUDA and lacks the symbol."""
    archs, kernel, report, explained = load(tree, library, "", "13.0")
    assert "do not load" in archs
    assert "aoti_torch_get_current_cuda_stream" in archs
    assert kernel == "False"
    assert "do not load" in report
    assert explained.startswith("triton.")


# machine code ------------------------------------------------------------------------------------

USAGE = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)


def usage(text: str) -> list[dict[str, str]]:
    """A line for each kernel and architecture, of what ptxas -v said."""
    return [found.groupdict() for found in USAGE.finditer(text)]


def spilling(rows: list[dict[str, str]]) -> list[str]:
    return [
        f"{r['kernel']} sm_{r['arch']}" for r in rows if r["stores"] != "0" or r["loads"] != "0"
    ]


@pytest.mark.parametrize("op", KERNELS)
def test_no_kernel_spills_on_any_architecture(tree: Path, op: str) -> None:
    (text,) = tree.glob(f"build/*/cuda/{op}.cu.txt")
    rows = usage(text.read_text())
    name, main, lesser, most = KERNELS[op]
    assert not spilling(rows)
    assert {row["arch"] for row in rows} == set(nvcc.ARCHS)
    assert sum(name in row["kernel"] for row in rows) == main * len(nvcc.ARCHS)
    assert len(rows) == (main + lesser) * len(nvcc.ARCHS)
    assert max(int(row["registers"]) for row in rows) <= most


def test_every_op_of_the_room_is_listed() -> None:
    stems = {path.stem for path in nvcc.sources(".cu")} - {"archs"}
    assert stems == set(KERNELS)


def test_a_spill_is_seen(tmp_path: Path) -> None:
    """The planted fault: registers capped at 32."""
    compiler = nvcc.compiler()
    assert compiler is not None
    text = (ROOT / "csrc" / "cuda" / "quantized_linear.cu").read_text()
    capped = text.replace("__launch_bounds__(kThreads, kBlocks)", "__launch_bounds__(kThreads, 8)")
    assert capped != text
    source = tmp_path / "capped.cu"
    source.write_text(re.sub(r"return .*launch<f16>\(task, on\);", "return nullptr;", capped))
    command = nvcc.command(compiler, source, tmp_path / "out.o", ["80"])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert spilling(usage(done.stderr))


def tool(name: str) -> str | None:
    """A tool of the toolkit, or that of the triton wheel."""
    found = shutil.which(name)
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        found = str(path) if path.exists() else None
    return found


def functions(tree: Path, op: str, arch: str) -> list[tuple[str, str]]:
    """(name, machine code) of the main kernels of an op."""
    (obj,) = tree.glob(f"build/*/cuda/{op}.cu.o")
    command = [str(tool("cuobjdump")), "-sass", "-arch", f"sm_{arch}", str(obj)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = [part.split("\n", 1) for part in code.split("Function : ")[1:]]
    main = [(name, body) for name, body in parts if KERNELS[op][0] in name]
    assert len(main) == KERNELS[op][1]
    return main


needs_cuobjdump = pytest.mark.skipif(tool("cuobjdump") is None, reason="no cuobjdump here")


@needs_cuobjdump
@pytest.mark.parametrize("arch", nvcc.ARCHS)
def test_quantised_decode_copies_asynchronously_and_multiplies_on_tensor_cores(
    tree: Path, arch: str
) -> None:
    for name, code in functions(tree, "quantized_linear", arch):
        assert "LDGSTS" in code, f"{name}: no cp.async"
        wanted = "HMMA.16816.F32" if "6__half" in name else "HMMA.16816.F32.BF16"
        assert wanted in code, f"{name}: no {wanted}"
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name}: local memory"


def check_2_4(name: str, code: str) -> None:
    """That a 2:4 product runs on sparse tensor cores, fed by cp.async and ldmatrix."""
    values = re.search(r"sparse24_productI(a|6__half|13__nv_bfloat16)", name)
    assert values is not None, name
    wanted = SPARSE_MMA[values[1]]
    assert re.search(rf"{re.escape(wanted)} ", code), f"{name}: no {wanted}"
    assert "LDGSTS" in code, f"{name}: no cp.async"
    assert "LDSM" in code, f"{name}: no ldmatrix"
    assert not re.search(r"\b(LDL|STL|ATOMG?|RED\.E)\b", code), f"{name}: local memory, atomics"


@needs_cuobjdump
@pytest.mark.parametrize("arch", nvcc.ARCHS)
def test_2_4_multiplies_on_sparse_tensor_cores(tree: Path, arch: str) -> None:
    for name, code in functions(tree, "sparse24_linear", arch):
        check_2_4(name, code)


@needs_cuobjdump
def test_a_2_4_product_without_its_instructions_is_seen(tree: Path) -> None:
    """The planted faults, in the machine code itself."""
    name, code = functions(tree, "sparse24_linear", "80")[0]
    check_2_4(name, code)
    for have, instead in ((".SP.", "."), ("LDGSTS", "LDG"), ("LDSM", "LDS")):
        assert have in code
        with pytest.raises(AssertionError, match="no "):
            check_2_4(name, code.replace(have, instead))
    with pytest.raises(AssertionError, match="local memory"):
        check_2_4(name, code + "\n STL [R1], R2 ;")


@needs_cuobjdump
@pytest.mark.parametrize("arch", nvcc.ARCHS)
def test_the_gradient_of_2_4_values_multiplies_on_tensor_cores(tree: Path, arch: str) -> None:
    for name, code in functions(tree, "sparse24_gradient", arch):
        wanted = "HMMA.16816.F32" if "6__half" in name else "HMMA.16816.F32.BF16"
        assert re.search(rf"{re.escape(wanted)} ", code), f"{name}: no {wanted}"
        assert "LDGSTS" in code, f"{name}: no cp.async"
        assert "LDSM.16.MT88.4" in code, f"{name}: no ldmatrix that transposes"
        assert not re.search(r"\b(LDL|STL|ATOMG?|RED\.E)\b", code), f"{name}: local memory, atomics"


@needs_cuobjdump
@pytest.mark.parametrize("arch", nvcc.ARCHS)
def test_packing_2_4_keeps_a_block_in_registers(tree: Path, arch: str) -> None:
    for name, code in functions(tree, "sparse24_pack", arch):
        wide = "128" if "compressIf" in name else "64"
        assert re.search(rf"LDG\.E\S*\.{wide}\.CONSTANT", code), f"{name}: no load of a whole four"
        assert not re.search(r"\b(LDL|STL|ATOMG?|RED\.E)\b", code), f"{name}: local memory, atomics"


@needs_cuobjdump
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_sparse_decode_multiplies_four_bytes_at_once(tree: Path, arch: str) -> None:
    for name, code in functions(tree, "sparse_linear", arch):
        assert ("IDP.4A.S8.S8" if "Int8" in name else "FFMA") in code, name
        assert not re.search(r"\b(LDL|STL|ATOMG?|RED\.E)\b", code), f"{name}: local memory, atomics"


@needs_cuobjdump
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_bitmap_decode_copies_asynchronously_and_counts_bits(tree: Path, arch: str) -> None:
    for name, code in functions(tree, "bitmap_linear", arch):
        for wanted in ("LDGSTS.E.BYPASS.128", "POPC", "FFMA"):
            assert wanted in code, f"{name}: no {wanted}"
        if "Li16E" in name:
            assert "LDS.128" in code, f"{name}: x is not read by 16 bytes"
        assert not re.search(r"\b(LDL|STL|ATOMG?|RED\.E)\b", code), f"{name}: local memory, atomics"


@needs_cuobjdump
@pytest.mark.parametrize("arch", nvcc.ARCHS)
def test_a_step_loads_everything_before_it_stores(tree: Path, arch: str) -> None:
    """Once, past the cache, of every width; the maps of 8-bit states stay in it."""
    for name, code in functions(tree, "fused_adamw", arch):
        moves = re.findall(r"\b((?:LDG|STG)\.[\w.]+)", code)
        streamed = [move for move in moves if ".EF" in move]
        assert {"LDG.E.EF", "LDG.E.EF.U16", "LDG.E.EF.U8"} <= set(streamed), name
        loads = [i for i, move in enumerate(streamed) if move.startswith("LDG")]
        assert loads == list(range(len(loads))), f"{name}: a load after a store"
        assert len(loads) == 8 * (2 + 2 + 2 + 2) + 2, f"{name}: {len(loads)} loads"
        assert not re.search(r"\b(LDL|STL|ATOMG?|RED\.E)\b", code), f"{name}: local memory, atomics"
