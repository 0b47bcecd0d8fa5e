"""kill -9 while a file is saved over another one: it is the old one or the new one, whole."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bigops import Int8, compress_, load, save
from bigops.train import load_checkpoint, save_checkpoint
from tests.accept.conftest import Accept, figures_of
from tests.support.saved_models import same_state, state_of

pytestmark = pytest.mark.slow


def _model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    compress_(model, {"0": Int8()})
    return model


def _load_checkpoint(path: Path) -> nn.Module:
    model = _model(9)
    assert load_checkpoint(path, model=model)["seed"] in (0, 1)
    return model


VERBS: dict[str, tuple[Callable[..., Any], Callable[[Path], nn.Module]]] = {
    "save": (lambda path, model, seed: save(model, path), load),
    "save_checkpoint": (
        lambda path, model, seed: save_checkpoint(path, model=model, seed=seed),
        _load_checkpoint,
    ),
}


def drive(verb: str, folder: str, kills: int) -> None:
    """Print how many of the kills fell into a save, and how many files were not whole.

    Savers are forked: each would import torch for seconds otherwise. One thread, so that nothing is
    lost in a fork.
    """
    torch.set_num_threads(1)
    write, read = VERBS[verb]
    path, rng = Path(folder) / "m", random.Random(0)
    models = [_model(0), _model(1)]
    states = [state_of(model) for model in models]
    write(path, models[0], 0)
    begin = time.perf_counter()
    write(path, models[1], 1)
    once, wrong, seen = time.perf_counter() - begin, 0, [0, 0]
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                for turn in range(1000):
                    write(path, models[turn % 2], turn % 2)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.2, 4) * once)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = read(path)
        which = [i for i in (0, 1) if same_state(found, states[i])]
        wrong += len(which) != 1
        for i in which:
            seen[i] += 1
    left = len(list(path.parent.iterdir())) - 1
    write(path, models[0], 0)  # what killed ones left is in nobody's way
    wrong += not same_state(read(path), states[0])
    print(json.dumps({"kills": kills, "amid_a_save": left, "each_seen": seen, "wrong": wrong}))


@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_save_leaves_a_whole_file(verb: str, tmp_path: Path, accept: Accept) -> None:
    kills = accept.count(100)
    call = f"drive({verb!r}, {str(tmp_path)!r}, {kills})"
    code = f"from tests.accept.test_killed_saves import drive; {call}"
    figures = figures_of(code)
    accept.result(**figures)
    assert figures["wrong"] == 0
    assert figures["amid_a_save"] >= kills // 10, "the kills fell between the saves"
