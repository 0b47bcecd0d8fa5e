"""The ways that an op can be served, on CPU tensors: the tests of an op run over all that serve it.

"reference" is what a device without kernels gets, "cpu" the C++ kernels, "triton" what a GPU gets,
interpreted, and "hostrun" the same where the CUDA C++ kernels are built, these run by csrc/hostrun.
A way is taken below the dispatcher, under the key of CPU tensors: public functions, autograd and
checks above it are the ones that users call. `Way.serving` asserts which kernels ran.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

import bigops.ops  # noqa: F401  registers the ops
from bigops import backend
from bigops.backend import machine
from bigops.ops import targets
from bigops.ops.family import Call, LinearOp
from bigops.ops.library import in_words
from tests.support import hostrun
from tests.support.guarded import guarded
from tests.support.kernels_ran import ISAS, isa

# The device whose entry in the dispatcher's table serves: one without kernels, and a GPU.
_KEYS = {"reference": "PrivateUse1", "triton": "CUDA", "hostrun": "CUDA"}
_PREFIX = {"reference": "reference.", "cpu": "cpu.", "triton": "triton.", "hostrun": "cuda."}
_STEPS = ("fused_adamw", "fused_grad_norm")  # in one file
# Whose kernels give the gradients, where it is not the way's own: the reference where `explain`
# says so, and Triton's behind a forward in CUDA C++.
_BACKWARD = {
    ("hostrun", "quantized_linear"): ("triton.",),
    ("hostrun", "sparse24_linear"): ("reference.",),
    ("hostrun", "sparse_linear"): ("triton.", "reference."),
}


def _ops() -> list[str]:
    """The ops that have a reference and a kernel; all others are made of these."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    reference = set(registered("CompositeExplicitAutograd"))
    kernels = set(registered("CPU")) | set(registered("CUDA"))
    ours = (name for name in reference & kernels if name.startswith("bigops::"))
    return sorted(name.removeprefix("bigops::") for name in ours)


@functools.cache
def _kernels(key: str) -> dict[str, Callable[..., Any]]:
    """For each op what the dispatcher calls for tensors of ``key``."""
    names = _ops()
    return {name: torch.library.get_kernel(f"bigops::{name}", key).call_boxed for name in names}


@contextlib.contextmanager
def _dispatched_as(key: str) -> Iterator[None]:
    """CPU tensors go where those of ``key`` do."""
    library = torch.library.Library("bigops", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is registered over another: it is
            for name, kernel in _kernels(key).items():
                library.impl(name, kernel, "CPU", with_keyset=True)
        yield
    finally:
        library._destroy()


@functools.cache
def _load(op: str) -> None:
    hostrun.schedule(hostrun.load_op(op), 0, False)


@contextlib.contextmanager
def built(op: str) -> Iterator[None]:
    """As where bigops/_cuda was built: what it serves goes there."""
    _load("fused_adamw" if op in _STEPS else op)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "cuda_error", "")
        patch.setattr(machine, "cuda_runs_on", lambda arch: True)
        patch.setattr(targets, "cuda_arch", lambda target: "sm_80")
        steps = sys.modules["bigops.ops.fused_adamw.cuda"]
        patch.setattr(steps, "cuda_built_for", lambda target: op in _STEPS)
        yield


def _is_gradient(name: str) -> bool:
    return "_backward" in name or "_linear_grad_" in name


class Way(NamedTuple):
    """One way; ``level`` is the instruction set of a CPU kernel."""

    name: str
    level: str = ""

    def __str__(self) -> str:
        return self.level or self.name

    @contextlib.contextmanager
    def taken(self, op: str) -> Iterator[None]:
        """Calls inside take this way; ``op`` says which CUDA C++ kernels "hostrun" is about."""
        with contextlib.ExitStack() as stack:
            if self.name == "cpu":
                stack.enter_context(isa(self.level))
            else:
                stack.enter_context(_dispatched_as(_KEYS[self.name]))
            if self.name in ("triton", "hostrun"):
                pytest.importorskip("triton")
                from tests.support import triton_interpreter

                triton_interpreter.install()
            if self.name == "triton":
                stack.enter_context(guarded())
            if self.name == "hostrun":
                if hostrun.lacks():
                    pytest.skip(hostrun.lacks())
                stack.enter_context(built(op))
            yield

    @contextlib.contextmanager
    def serving(self, op: str, *fragments: str, gradients: bool = False) -> Iterator[None]:
        """Take this way, and fail unless its kernels of ``op`` ran and no others.

        ``fragments``: parts of the names that must be among them, but for the reference, whose name
        is that of the op alone; with ``gradients`` a backward must be, too.
        """
        own = _PREFIX[self.name]
        with self.taken(op), backend.record() as names:
            yield
        forward = [plain(name) for name in names if not _is_gradient(name)]
        backward = [plain(name) for name in names if _is_gradient(name)]
        assert any(name.startswith(own + op) for name in forward), f"{self}: {names}"
        assert all(name.startswith(own) for name in forward), f"{self}: another ran: {names}"
        allowed = _BACKWARD.get((self.name, op), (own,))
        assert all(name.startswith(allowed) for name in backward), f"{self}: another ran: {names}"
        assert backward or not gradients, f"{self}: no backward among {names}"
        for fragment in fragments if self.name != "reference" else ():
            assert any(fragment in name for name in names), f"no {fragment!r} among {names}"


def serve_by(
    patch: pytest.MonkeyPatch,
    op: LinearOp,
    forward: Callable[[Call], torch.Tensor],
    backward: Callable[..., tuple[torch.Tensor, ...]] | None = None,
) -> None:
    """Let these serve the public calls of an op, as where it is dispatched to their kernels."""

    def gradients(grad: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
        assert backward is not None
        call, _, needs = op.gradients.call(grad, *args)
        return backward(grad, call, **needs)

    patch.setattr(op, "forward", in_words(op.forward, lambda *args: forward(op.call(*args))))
    if backward is not None:
        patch.setattr(op.gradients, "backward", in_words(op.gradients.backward, gradients))
    # what holds the op that it calls is made anew
    names = ("eager", "eager_frozen", "functorch")
    for name, function in zip(names, op.gradients._functions(), strict=True):
        patch.setattr(op.gradients, name, function)
    patch.setattr(op, "run", op._dispatcher())


@contextlib.contextmanager
def reachable(way: Way, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Kernels may also touch these tensors, whose addresses stand in a table."""
    if way.name != "triton":
        yield
        return
    pytest.importorskip("triton")
    from tests.support import triton_interpreter

    with triton_interpreter.reachable(tensors):
        yield


def plain(name: str) -> str:
    """The name of a kernel without the level of a CPU one."""
    parts = name.split(".")
    return ".".join([parts[0], *parts[2:]] if parts[0] == "cpu" else parts)


def covering(*axes: Iterable[Any]) -> list[Any]:
    """Parameters: all combinations of the axes, those slow that a small sample has no need of.

    The sample of the unit suite holds every value of every axis, as often as the longest axis is
    long; the slow suite runs the rest. For ways that take a second a case.
    """
    values = [list(axis) for axis in axes]
    if not all(values):  # such as the instruction sets of a CPU without the extension
        return []
    kept = {tuple(i % len(v) for v in values) for i in range(max(map(len, values)))}
    combinations = itertools.product(*(range(len(v)) for v in values))
    return [
        pytest.param(
            *(v[i] for v, i in zip(values, at, strict=True)),
            marks=() if at in kept else pytest.mark.slow,
        )
        for at in combinations
    ]


REFERENCE, TRITON, HOSTRUN = Way("reference"), Way("triton"), Way("hostrun")
CPU = [Way("cpu", level) for level in ISAS]
