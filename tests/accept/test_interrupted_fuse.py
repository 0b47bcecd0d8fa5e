"""Exceptions at random lines of fuse_, and Ctrl-C at random moments: the model is as before."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import numpy as np
import pytest
from torch import nn

import bigops
from tests.accept.conftest import Accept
from tests.interrupts import ROOT, lines, state
from tests.test_atomic import MODELS, X

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed, and nothing is faster."""
    same = lambda sides, **_: {name: np.ones(30) for name in sides}  # noqa: E731
    monkeypatch.setattr("bigops.timing.interleave", same)


def fuse(model: nn.Module, timed: bool) -> None:
    bigops.fuse_(model, X if timed else None)


def test_exceptions_at_random_lines(accept: Accept) -> None:
    draws = random.Random(0)
    counts = {}
    for name, make in MODELS.items():
        for timed in (False, True):
            fuse(make(), timed)
            model = make()
            counts[name, timed] = lines(lambda m=model, t=timed: fuse(m, t))[0]  # type: ignore[misc]
    raised = 0
    for _ in range(accept.count(1000)):
        name, timed = draws.choice(list(counts))
        model = MODELS[name]()
        before = state(model)
        at = draws.randint(1, counts[name, timed])
        _, place = lines(lambda m=model, t=timed: fuse(m, t), at)  # type: ignore[misc]
        if place is not None:
            raised += 1
            assert state(model) == before, f"{name}, interrupted at {place}"
    assert raised > 0
    accept.result(cases=raised, wrong=0)


def test_ctrl_c_at_random_moments(accept: Accept) -> None:
    """A real signal, wherever it falls: in this package, in torch, or between the two."""
    draws = random.Random(1)
    fuse(MODELS["sequential"](), True)
    pressed = inside = 0
    while inside < accept.count(200):
        name, timed = draws.choice(list(MODELS)), draws.random() < 0.5
        model = MODELS[name]()
        before = state(model)
        pressed += 1
        assert pressed < 100 * accept.count(200), "the signals never fall into the call"
        timer = threading.Timer(draws.random() * 0.03, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            fuse(model, timed)
            timer.join()
            time.sleep(0.01)  # the signal comes here at the latest
        except KeyboardInterrupt as error:
            if _fell_inside(error):
                inside += 1
                assert state(model) == before, f"{name}, pressed the {pressed}th time"
        timer.join()
    accept.result(cases=inside, wrong=0)


def _fell_inside(error: BaseException) -> bool:
    """Whether the call was still running when the exception was raised."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(ROOT):
            return True
        trace = trace.tb_next
    return False
