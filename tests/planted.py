"""Triton kernels with a fault planted in their source, as modules beside the sound ones."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType


def load(folder: Path, stem: str, source: str) -> ModuleType:
    """``source`` as the module bigops.kernels.<stem>, from a file in ``folder``."""
    path = folder / f"{stem}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"bigops.kernels.{stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def plant(kernels: ModuleType, folder: Path, old: str, new: str) -> ModuleType:
    """A copy of ``kernels`` with ``old`` replaced by ``new``."""
    assert kernels.__file__
    source = Path(kernels.__file__).read_text()
    assert old in source, f"nothing to plant the fault on: {old!r}"
    return load(folder, "planted_" + re.sub(r"\W", "", folder.name), source.replace(old, new))
