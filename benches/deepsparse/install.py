"""Make the environment of DeepSparse 1.8: `python3.11 benches/deepsparse/install.py`.

DeepSparse is the fastest fp32 engine for unstructured sparsity, and its last release needs Python
3.8 to 3.11 and numpy 1.26, which torch's environment has not. So it runs in a process of its own
(`worker.py`), and `bigops bench --op sparse_linear` finds it in `build/deepsparse-env`.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

# not beside this file: tests and linters read all that lies in benches/
ENVIRONMENT = Path(__file__).resolve().parents[2] / "build" / "deepsparse-env"
PINS = ("deepsparse==1.8.0", "numpy==1.26.4", "onnx==1.14.1")


def main() -> int:
    """Make the environment, install the pins, and load the engine once."""
    if not (3, 8) <= sys.version_info[:2] <= (3, 11):
        print(f"expected Python 3.8 to 3.11, got {sys.version.split()[0]}", file=sys.stderr)
        return 2
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    python = str(ENVIRONMENT / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PINS], check=True)
    # from there: a folder named deepsparse beside the caller would shadow the package
    subprocess.run([python, "-c", "import deepsparse"], check=True, cwd=ENVIRONMENT)
    print(f"made {ENVIRONMENT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
