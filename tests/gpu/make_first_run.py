"""Put what the first minutes on an H200 need into one folder: python tests/gpu/make_first_run.py

The image there has Triton 3.6, which cannot serve all of bigops, and reaches no package index. At
most 64 MiB can be brought along, and the wheel of a Triton that serves has four times that. So it
is packed without symbols, without the back ends' own assemblers (CUDA's serves) and without what
other devices, profilers and plugins want. The launcher is compiled there: its headers stay.
"""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "gpu-first-run"
TRITON, PYTHON = "3.9.0", "3.12"
PLATFORMS = ("manylinux_2_27_x86_64", "manylinux_2_28_x86_64")
MOST = 64 << 20  # bytes of all that is brought along
LEFT_OUT = (  # of the folder triton of the wheel
    "_C/libproton.so",
    "_C/libtriton/*",  # type stubs
    "FileCheck",
    "instrumentation/*",
    "plugins/*",
    "include/*",
    "backends/amd/lib/*.so",
    "backends/nvidia/lib/cupti*",
    "backends/nvidia/bin/*",
)
NEEDED = (
    "_C/libtriton.so",
    "backends/nvidia/include/cuda.h",
    "backends/nvidia/lib/libdevice.10.bc",
)


def left_out(name: str) -> bool:
    """Whether a file of the wheel stays behind; ``name`` as the wheel has it."""
    top, _, rest = name.partition("/")
    return top != "triton" or any(fnmatch.fnmatch(rest, pattern) for pattern in LEFT_OUT)


def unpack(wheel: Path, folder: Path) -> None:
    """The files that are brought along, stripped of symbols.

    Raises:
        ValueError: a wheel without one of `NEEDED`.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not left_out(name)]
        if missing := {f"triton/{name}" for name in NEEDED} - set(names):
            raise ValueError(f"{wheel.name}: expected {', '.join(sorted(missing))} in it")
        archive.extractall(folder, names)
    subprocess.run(["strip", "--strip-unneeded", folder / "triton/_C/libtriton.so"], check=True)


def pack(wheel: Path, folder: Path = FOLDER, most: int = MOST) -> Path:
    """triton.tar.xz of a wheel and a copy of first_run.sh, in ``folder``.

    Raises:
        ValueError: a wheel that is no such Triton, or more than ``most`` bytes came out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "triton.tar.xz"
    out.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unpack(wheel, Path(scratch))
        made = Path(scratch) / out.name
        # preset 1 comes to 48 MiB in minutes; 6 saves a few of them and takes half an hour
        with tarfile.open(made, "w:xz", preset=1) as archive:
            archive.add(Path(scratch) / "triton", "triton")
        script = HERE / "first_run.sh"
        size = made.stat().st_size + script.stat().st_size
        if size > most:
            raise ValueError(f"{out.name}: expected at most {most} bytes; got {size}")
        made.rename(out)
    shutil.copy(script, folder)
    return out


def download(folder: Path) -> Path:
    """The wheel, for the Python of that image, whatever runs here."""
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--implementation",
            "cp",
            "--python-version",
            PYTHON,
            *platforms,
            "--dest",
            folder,
            f"triton=={TRITON}",
        ],
        check=True,
    )
    (wheel,) = folder.glob("triton-*.whl")
    return wheel


def main(argv: list[str] | None = None) -> int:
    """Download, pack, say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="pack this one in place of the one downloaded")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        out = pack(options.wheel or download(Path(scratch)))
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB of {MOST >> 20}")
    print(f"next: OUT=FOLDER bash {FOLDER.name}/first_run.sh correct; then fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
