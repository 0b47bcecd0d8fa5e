"""Exceptions and real Ctrl-C in the verbs that change a model: none leaves half a change."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bigops import FormatError
from tests.accept.conftest import Accept
from tests.support.interrupts import ROOT, lines, state
from tests.support.kernels_ran import needs_extension
from tests.support.verbs import VERBS, level  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("level"), needs_extension]


class FailsAt(TorchDispatchMode):
    """Raises at one of the ops that run inside, as one does that gets no memory."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        if self.count == self.at:
            raise MemoryError(f"planted at op {self.at}, {func}")
        return func(*args, **(kwargs or {}))


def by_op(call: Callable[[], object], at: int = -1) -> tuple[int, str | None]:
    """As `lines`: run ``call`` and raise at an op; how many ran, and where it was raised."""
    mode = FailsAt(at)
    try:
        with mode:
            call()
    except (MemoryError, FormatError) as error:
        if not 0 < at <= mode.count:  # torch and safetensors may make an error of their own of it
            raise
        return mode.count, str(error)
    return mode.count, None


def test_exceptions_anywhere(accept: Accept) -> None:
    """At random lines of the package and at random ops, over all verbs in turn."""
    ways = [(name, way) for name in VERBS for way in (lines, by_op)]
    counts: dict[Any, int] = {}
    for name, way in ways:
        make, verb = VERBS[name]
        verb(make())  # what is made once per process is made now
        model = make()
        untouched = state(model)
        counts[name, way] = way(lambda m=model, v=verb: v(m))[0]  # type: ignore[misc]
        assert state(model) != untouched, name
    ways = [way for way in ways if counts[way]]  # fuse_ and others may run no op
    rng, torn, raised = random.Random(0), [], 0
    cases = accept.count(1000)
    tried = 0
    while raised < cases:
        name, way = ways[tried % len(ways)]
        tried += 1
        make, verb = VERBS[name]
        model = make()
        before = state(model)
        _, place = way(lambda m=model, v=verb: v(m), rng.randint(1, counts[name, way]))  # type: ignore[misc]
        if place is None:
            continue  # Python dropped it, at the end of a generator
        raised += 1
        if state(model) != before:
            torn.append(f"{name} at {place}")
    accept.result(exceptions=raised, torn=len(torn))
    assert not torn


def test_ctrl_c_at_any_time(accept: Accept) -> None:
    """A real SIGINT from another thread, at a random time of the call."""
    rng, torn, inside, whole = random.Random(1), [], 0, 0
    cases = accept.count(200)
    names, world = list(VERBS), World()
    took = {}
    for name in names:
        make, verb = VERBS[name]
        verb(make())
        model, start = make(), time.perf_counter()
        verb(model)
        took[name] = time.perf_counter() - start
    tried = 0
    while inside < cases:
        name = names[tried % len(names)]
        tried += 1
        make, verb = VERBS[name]
        model = make()
        before = state(model)
        where = interrupted(lambda m=model, v=verb: v(m), rng.uniform(0, took[name]))  # type: ignore[misc]
        if where is None:
            whole += 1
        else:
            inside += 1
            if state(model) != before:
                torn.append(f"{name} at {where}")
        torn += [f"{name} at {where}: {change}" for change in world.changes()]
    accept.result(ctrl_c=inside, ended_before=whole, torn=len(torn))
    assert not torn


class World:
    """What the process has besides the model that a verb may set for a while."""

    def __init__(self) -> None:
        self.before = self.now()

    def now(self) -> dict[str, Any]:
        return {
            "nn.Module.__call__": nn.Module.__call__,
            "nn.Module.__getattr__": nn.Module.__getattr__,
            "gradients": torch.is_grad_enabled(),
            "modes": torch._C._len_torch_dispatch_stack(),
        }

    def changes(self) -> list[str]:
        """What is not as it was."""
        return [name for name, value in self.now().items() if value != self.before[name]]


def interrupted(call: Callable[[], object], delay: float) -> str | None:
    """Run ``call``, press Ctrl-C after ``delay`` seconds; where it hit, None where it came late."""
    pressed = threading.Event()

    def press() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)
        pressed.set()

    thread = threading.Thread(target=press)
    where = None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            thread.start()
            call()
        except KeyboardInterrupt as error:
            where = _inside(error)
        while not pressed.is_set():
            time.sleep(0.001)
        thread.join()
    except KeyboardInterrupt:  # it came after the verb had returned
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    return where


def _inside(error: BaseException) -> str | None:
    """The innermost line of the package below which it was raised; None outside of the verb."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(ROOT)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
