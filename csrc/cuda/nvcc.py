"""How csrc/cuda becomes bigops/_cuda: what setup.py runs, and what the tests compile by.

Sources come in twos: ``<op>.cu`` holds the kernels and their launch and knows nothing of torch, so
that nvcc sees no torch header and g++ can run it (csrc/hostrun); ``<op>.cpp`` checks tensors and
registers the op. Nothing here asks the build machine's GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent
# a: with the instructions of that very architecture (wgmma, tcgen05).
ARCHS = ("80", "86", "89", "90a", "100a", "120")
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",
    "--threads=0",
    f"-I{CSRC}",
]
# --no-as-needed: as in setup.py. libtorch_cuda is not named: it is in the process wherever this
# library is loaded, and the CPU build of torch, which this may be built against, has none.
LINK = [
    "-Wl,--no-as-needed",
    "-ltorch",
    "-ltorch_cpu",
    "-Wl,--exclude-libs,ALL",
    "-lcudart_static",
    "-ldl",
    "-lrt",
    "-lpthread",
]


def sources(suffix: str) -> list[Path]:
    """Files of csrc/cuda."""
    return sorted((CSRC / "cuda").glob(f"*{suffix}"))


def compiler() -> str | None:
    """Path of nvcc: that of CUDA_HOME where it is set, else the first on the path."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def toolkit(nvcc: str) -> Path:
    """The folder that holds include/ and lib64/, as nvcc itself names it."""
    command = [nvcc, "--dryrun", "-x", "cu", "-E", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (top,) = (line.split("=", 1)[1] for line in said.splitlines() if line.startswith("#$ TOP="))
    return Path(top.strip()).resolve()


def host_flags(nvcc: str) -> tuple[list[str], list[str]]:
    """Flags for the .cpp files and for the link; USE_CUDA: the shim of the current stream."""
    top = toolkit(nvcc)
    folders = [f"-L{top / name}" for name in ("lib64", "lib") if (top / name).is_dir()]
    return ["-DUSE_CUDA", f"-I{top / 'include'}"], [*folders, *LINK]


def archs() -> list[str]:
    """BIGOPS_CUDA_ARCHS, such as ``"80 90a"``, or all of `ARCHS`."""
    wanted = os.environ.get("BIGOPS_CUDA_ARCHS", "").replace(",", " ").split()
    for arch in wanted:
        if arch not in ARCHS:
            raise SystemExit(f"BIGOPS_CUDA_ARCHS: expected some of {' '.join(ARCHS)}; got {arch!r}")
    return wanted or list(ARCHS)


def command(nvcc: str, source: Path, out: Path, archs: list[str], *more: str) -> list[str]:
    """The call of nvcc that compiles a .cu file; machine code for each of ``archs``."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-DBIGOPS_CUDA_ARCHS={'_'.join(archs)}")
    return [nvcc, *NVCC_FLAGS, *codes, *more, "-c", str(source), "-o", str(out)]


def requested() -> str | None:
    """nvcc where BIGOPS_CUDA=1 asks for CUDA kernels; None for a build without them, said why."""
    wanted = os.environ.get("BIGOPS_CUDA", "0")
    if wanted not in ("0", "1"):
        raise SystemExit(f"BIGOPS_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    archs()
    found = compiler()
    if found is None:
        where = "in CUDA_HOME" if os.environ.get("CUDA_HOME") else "on the path"
        print(
            f"bigops: warning: BIGOPS_CUDA=1, but there is no nvcc {where}; building without CUDA "
            "C++ kernels (Triton serves the GPU)",
            file=sys.stderr,
        )
    return found


def compile_all(nvcc: str, folder: Path) -> list[str]:
    """Objects of the .cu files in ``folder``; a file is compiled again where something changed."""
    stamp = folder / "archs.txt"
    wanted = " ".join(archs())
    fresh = stamp.exists() and stamp.read_text() == wanted
    changed = max(p.stat().st_mtime for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".py"))
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in sources(".cu"):
        out = folder / f"{source.stem}.cu.o"
        newest = max(changed, source.stat().st_mtime)
        if not (fresh and out.exists() and out.stat().st_mtime >= newest):
            print(f"bigops: nvcc {source.name} for {wanted}", file=sys.stderr)
            done = subprocess.run(
                command(nvcc, source, out, archs()), text=True, stderr=subprocess.PIPE
            )
            if done.returncode != 0:
                raise SystemExit(f"bigops: nvcc failed on {source.name}:\n{done.stderr}")
            out.with_suffix(".txt").write_text(done.stderr)  # registers and spills, by ptxas -v
        objects.append(str(out))
    stamp.write_text(wanted)
    return objects
