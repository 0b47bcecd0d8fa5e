"""Triton kernels with a fault planted in their source, as modules beside the sound ones."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from triton.runtime.errors import InterpreterError

CAUGHT = (AssertionError, IndexError, RuntimeError, InterpreterError)
"""What a check or the interpreter raises where it sees a fault."""


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


def plant(kernels: ModuleType, folder: Path, old: str, new: str, *used: ModuleType) -> ModuleType:
    """A copy of ``kernels`` with ``old`` replaced by ``new``.

    So are copies of ``used``, modules which it or a later one of them imports from, and which the
    fault may lie in; the copies import from each other.
    """
    stem = "planted_" + re.sub(r"\W", "", folder.name)
    found, copies = 0, {}
    for module in (*used, kernels):
        assert module.__file__
        source = Path(module.__file__).read_text()
        found += source.count(old)
        source = source.replace(old, new)
        for name, copy in copies.items():
            source = source.replace(f"from {name} import", f"from {copy} import")
        planted = load(folder, f"{stem}_{module.__name__.rpartition('.')[2]}", source)
        copies[module.__name__] = planted.__name__
    assert found, f"nothing to plant the fault on: {old!r}"
    return planted
