"""The C++ extensions, and nothing else: metadata lives in pyproject.toml.

A new op adds files under csrc/; they are found by glob. Files in csrc/cpu/simd/ are compiled for
the instruction set that the first word of their name gives, every other file for the baseline.
BIGOPS_CUDA=1 builds csrc/cuda besides, as csrc/cuda/nvcc.py says.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip runs this file from elsewhere
from csrc.cuda import nvcc  # noqa: E402

# Instruction set -> compiler flags. -ffp-contract=off (below) keeps a*b+c two roundings unless a
# kernel asks for fma by name: the quantisers must agree with their Python reference to the bit.
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "avx512vnni": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512vnni",
        "-mfma",
        "-mf16c",
    ],
    "avx512bf16": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512bf16",
        "-mfma",
        "-mf16c",
    ],
    # The tiles are written in assembler (csrc/cpu/simd/tiles_amx.h): no flag of the compiler.
    "amx": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512vnni",
        "-mavx512bf16",
        "-mfma",
        "-mf16c",
    ],
}
X86_ONLY = set(ISA_FLAGS) - {"portable"}
TORCH_TARGET = "0x020a000000000000"  # stable ABI of torch 2.10: one build serves later versions
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-maybe-uninitialized",  # the latter: gcc 12's own avx512fintrin.h
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]
# --no-as-needed: the stable shims live in libtorch_cpu and look unused to the linker
LINK = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]


def is_x86() -> bool:
    return os.uname().machine in ("x86_64", "AMD64")


def isa_of(source: str) -> str | None:
    path = Path(source)
    return path.stem.split("_")[0] if path.parent.name == "simd" else None


def sources() -> list[str]:
    found = sorted(
        str(p.relative_to(ROOT))
        for folder in ("*.cpp", "common/*.cpp", "cpu/*.cpp", "cpu/simd/*.cpp")
        for p in (ROOT / "csrc").glob(folder)
    )
    return [s for s in found if is_x86() or isa_of(s) not in X86_ONLY]


class BuildExt(build_ext):
    """Flags per file, several files at a time, and a plain word when something is missing."""

    nvcc: str | None = None

    def finalize_options(self) -> None:
        self.nvcc = nvcc.requested()
        modules = self.distribution.ext_modules  # kept where this is called again
        if self.nvcc and all(module.name != "bigops._cuda" for module in modules):
            files = [str(path.relative_to(ROOT)) for path in nvcc.sources(".cpp")]
            modules.append(Extension("bigops._cuda", files, language="c++"))
        super().finalize_options()

    def build_extensions(self) -> None:
        for room in ("kernels", "benches"):
            if not (ROOT / "bigops" / room).is_dir():
                raise SystemExit(
                    f"bigops/{room} is no folder: this checkout lost its symlink to {room}/ "
                    f"(git config core.symlinks true; git checkout bigops/{room})"
                )
        if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
            print(
                "bigops: no C++ compiler found; installing in pure Python (see `bigops doctor`)",
                file=sys.stderr,
            )
            self.extensions = []
            return
        try:
            import pybind11
            import torch
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise SystemExit(
                f"bigops builds against the installed torch, but {error.name!r} is not importable "
                "here. Install torch and pybind11 first, then: pip install --no-build-isolation ."
            ) from error
        print(f"bigops: building for torch {torch.__version__}", file=sys.stderr)
        # pip hands an editable build a throwaway folder; objects kept here make a rebuild short
        tag = f"{sys.implementation.cache_tag}-{torch.__version__}"
        self.build_temp = str(ROOT / "build" / tag)
        for extension in self.extensions:
            extension.include_dirs = [str(ROOT / "csrc"), pybind11.get_include(), *include_paths()]
            extension.library_dirs = library_paths()
            extension.extra_link_args = LINK
            if extension.name == "bigops._C":
                self.parallel_objects(extension, FLAGS)
                continue
            include, extension.extra_link_args = nvcc.host_flags(self.nvcc)
            self.parallel_objects(extension, [*FLAGS, *include])
            extension.extra_objects += nvcc.compile_all(self.nvcc, Path(self.build_temp) / "cuda")
        super().build_extensions()

    def parallel_objects(self, extension: Extension, common: list[str]) -> None:
        """Compile every source that is newer than its object, with its own flags, in parallel."""
        from concurrent.futures import ThreadPoolExecutor

        compiler = self.compiler
        headers = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".inl")]
        watched = [Path(__file__), *(p for p in headers if p.parent.name != "hostrun")]
        newest_header = max(p.stat().st_mtime for p in watched)

        def compile_one(source: str) -> str:
            flags = [*common, "-O3", "-g0", *ISA_FLAGS[isa_of(source) or "portable"]]
            (obj,) = compiler.object_filenames([source], output_dir=self.build_temp)
            newest = max(newest_header, (ROOT / source).stat().st_mtime)
            if not Path(obj).exists() or Path(obj).stat().st_mtime < newest:
                compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=extension.include_dirs,
                    extra_preargs=flags,
                )
            return obj

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            extension.extra_objects = list(pool.map(compile_one, extension.sources))
        extension.depends = list(extension.extra_objects)  # a changed header must relink too
        extension.sources = []


setup(
    ext_modules=[Extension("bigops._C", sources(), language="c++")],
    cmdclass={"build_ext": BuildExt},
)
