"""A GPU that is this CPU, a scripted timer, and the file of tuned tiles between two runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bigops.backend import gpu_tiles
from bigops.kernels.common import tuned
from bigops.kernels.common.tiles import TileConfig
from bigops.ops import targets
from bigops.ops import tuned as _triton_tuned
from bigops.tune import tiles as tune_gpu
from bigops.tune.measured import TunedFile
from bigops.tune.tiles import Target

MACHINE = gpu_tiles.machine("Some GPU 80GB", "interpreter", "3.9.0")
TARGET = Target(torch.device("cpu"), MACHINE)
FILE = TunedFile(gpu_tiles, MACHINE, tune_gpu.SECTIONS)
TILES = [TileConfig(32, 32, 32, 2, 4, stages, 2) for stages in (2, 3, 4)]
NAMES = [json.dumps(list(tile)) for tile in TILES]
SHAPE = (20, 48, 32)
KEY = "fused_linear: plain aligned f32 m32-n64-k32"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty user's cache, and no tuned tiles afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    for memo in (_triton_tuned.tables, _triton_tuned.hand_over, targets.unserved):
        getattr(memo, "cache_clear", lambda: None)()
    tuned.clear()


@pytest.fixture
def three_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton_tuned, "candidates", lambda *_: TILES)


class Scripted:
    """A timer that makes each call once and gives set seconds, by tile."""

    def __init__(self, *seconds: float, stop: int | None = None) -> None:
        self.seconds = dict(zip(NAMES, seconds, strict=False))
        self.calls, self.stop = 0, stop

    def __call__(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        for call in calls.values():
            call()
        return {name: self.seconds.get(name, 1.0) for name in calls}


def run(timer: Scripted, **more: Any) -> list[str]:
    lines: list[str] = []
    options: dict[str, Any] = {"ops": ["fused_linear"], "shapes": [SHAPE], "dtypes": ["f32"]}
    tune_gpu.tune(TARGET, **{**options, **more}, report=lines.append, timer=timer)
    return lines


def fill() -> Path:
    """A file that holds what a run would write, without one."""
    path = gpu_tiles.tuned_file(MACHINE)
    path.parent.mkdir(parents=True, exist_ok=True)
    tune_gpu.keep(FILE, KEY, "20x48x32", point(3, 2, 1))
    return path


def stored() -> dict[str, Any]:
    return gpu_tiles.read(gpu_tiles.tuned_file(MACHINE), MACHINE)


def serve(monkeypatch: pytest.MonkeyPatch) -> gpu_tiles.Table:
    """What a new process on such a GPU would serve by."""
    table = _triton_tuned.checked(gpu_tiles.current(MACHINE))
    forget()
    monkeypatch.setattr(_triton_tuned, "tables", lambda: {"interpreter": table})
    return table


# --- the choice ----------------------------------------------------------------------------------


def point(*seconds: float | None) -> dict[str, Any]:
    pairs = zip(NAMES, seconds, strict=True)
    return {"seconds": {n: s for n, s in pairs if s is not None}, "failed": {}}
