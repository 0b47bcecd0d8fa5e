"""Planted faults and sanitizers on the optimiser kernels of csrc/cuda (fused_adamw)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops.ops.fused_adamw import reference_adamw, reference_norm
from bigops.ops.fused_adamw.triton import maps_of
from tests.support import hostrun
from tests.support.cases.optimizer import Problem, round_roots, same
from tests.support.tolerance import check

SOURCE = Path(__file__).parent / "hostrun_fused_adamw.cu"
pytestmark = [hostrun.needs(), pytest.mark.slow]
MIXED = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _roots(monkeypatch: pytest.MonkeyPatch) -> None:
    round_roots(monkeypatch)


KERNEL = "fused_adamw.cu"
FAULTS = {
    "tensor before": (".chunk <= static_cast", ".chunk < static_cast"),
    "wrong divisor": ("absmax > 0.0f ? absmax : 1.0f", "1.0f"),
    "block skipped": ("in_row += kWarps", "in_row += 2 * kWarps"),
    "half of a word": ("words[j / 2] >> 16 * (j % 2)", "words[j / 2] >> 16 * (j / 4)"),
    "random numbers of another block": (
        "at / kStepBlock * 32 + place % 32",
        "at / kStepBlock + place % 32",
    ),
    "absmax of half a warp": (
        "int bits = 16; bits > 0; bits /= 2) {\n    const uint32_t",
        "int bits = 8; bits > 0; bits /= 2) {\n    const uint32_t",
    ),
    "half of another element": ("phase / 32 + place / 32", "phase / 32"),
    "lane of another element": ("phase % 32 + lane", "lane"),
    "rows skipped": ("in_row -= per_row) ++row", "in_row -= per_row) row += 2"),
    "absmax of another row": ("scale + block, absmax", "scale + begin / kStepBlock, absmax"),
    "0 from above 0": ("index == 0 && x[j] > 0.0f ? 1 : index", "index"),
}


FIRST = 1000  # element of the whole tensor that is the first of the second one


def arguments(problem: Problem, **more: Any) -> tuple[Any, ...]:
    """The arguments of `run_adamw`: a problem of two tensors, the second with states of 8 bits."""
    codes = [torch.full(problem.params[1].shape, zero, dtype=torch.uint8) for zero in (127, 0)]
    problem.first[1], problem.second[1] = codes
    grads, types = problem.grads(0), dict(zip(MIXED, (1, 2, 3), strict=True))
    (p0, p1), (m0, m1), (v0, v1) = problem.params, problem.first, problem.second
    copy = torch.zeros(p1.shape, dtype=torch.float16)
    return (
        p0,
        grads[0],
        m0,
        v0,
        p0.numel(),
        types[p0.dtype],
        p1,
        grads[1],
        m1,
        v1,
        problem.first_scales[1],
        problem.second_scales[1],
        copy,
        p1.numel(),
        types[p1.dtype],
        3,
        *problem.steps,
        torch.zeros(4),
        *maps_of(torch.device("cpu")),
        more.get("norm"),
        1,
        p1.shape[1],
        FIRST,
    )


def problems() -> tuple[Problem, Problem]:
    """Ours and the reference after a step."""
    shapes = [(8192 + 300,), (19, 331)]
    ours, theirs = (Problem(torch.float32, torch.bfloat16, shapes=shapes) for _ in range(2))
    theirs.first[1] = torch.full(shapes[1], 127, dtype=torch.uint8)
    theirs.second[1] = torch.zeros(shapes[1], dtype=torch.uint8)
    for i, (p, g) in enumerate(zip(theirs.params, theirs.grads(0), strict=True)):
        scales = (theirs.first_scales[1], theirs.second_scales[1]) if i else (None, None)
        state = (theirs.first[i], theirs.second[i], theirs.steps[i])
        place = (FIRST, p.numel(), p.numel()) if i else None
        random = (5, i, 0, place)
        reference_adamw(p, g, *state, *scales, None, 1e-2, 0.8, 0.95, 1e-6, 0.1, 1.0, random)
    return ours, theirs


def wrong(library: Path, seed: int) -> bool:
    ours, theirs = problems()
    hostrun.call(library, "run_adamw", *arguments(ours), seed=seed)
    try:
        same(ours, theirs)
    except AssertionError:
        return True
    return False


def test_the_sound_kernel_passes_where_faults_are_planted() -> None:
    assert not any(wrong(hostrun.build(SOURCE), seed) for seed in (0, 1, 7))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_gives_wrong_values(fault: str) -> None:
    library = hostrun.build(SOURCE, "canary", (KERNEL, *FAULTS[fault]))
    assert wrong(library, 7)


@pytest.mark.parametrize("fault", [False, True])
def test_a_norm_that_nobody_looks_at_is_seen(fault: bool) -> None:
    planted = (KERNEL, "1.7976931348623157e308)) return false", "1.0)) return true")
    library = hostrun.build(SOURCE, "canary", planted if fault else None)
    ours, _ = problems()
    before, norm = [p.clone() for p in ours.params], torch.tensor(torch.inf).double()
    hostrun.call(library, "run_adamw", *arguments(ours, norm=norm))
    kept = all(torch.equal(p, old) for p, old in zip(ours.params, before, strict=True))
    assert kept != fault
    assert int(ours.steps[0]) == fault


BARRIER = "__syncthreads();  // the sums of all warps"
NORM_FAULTS = {
    "barrier forgotten": (BARRIER, ""),
    "bfloat16 read as half": ("type == kStepBFloat16", "type == kStepNone"),
}


def norm_of(library: Path, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    grads = [torch.randn(8500), torch.randn(301).bfloat16()]
    partial, norm = torch.zeros(3).double(), torch.zeros(()).double()
    given = (grads[0], 8500, 1, grads[1], 301, 2, partial, norm)
    hostrun.call(library, "run_norm", *given, seed=seed)
    return norm, reference_norm(grads)


@pytest.mark.parametrize("fault", ["", *NORM_FAULTS])
def test_a_planted_fault_gives_a_wrong_norm(fault: str) -> None:
    planted = (KERNEL, *NORM_FAULTS[fault]) if fault else None
    library = hostrun.build(SOURCE, "canary", planted)
    caught = []
    for seed in (0, 1, 7):
        norm, truth = norm_of(library, seed)
        try:
            check(norm, truth, truth, truth)
        except AssertionError:
            caught.append(seed)
    assert bool(caught) == bool(fault)


def apart(folder: Path, sanitize: str, fault: hostrun.Fault | None, **how: Any) -> tuple[int, str]:
    """(exit code, what it said) of a step in a process of its own; values held where it ends."""
    ours, theirs = problems()
    library = hostrun.build(SOURCE, sanitize, fault)
    args = arguments(ours)
    done = hostrun.call_apart(library, "run_adamw", *args, folder=folder, sanitize=sanitize, **how)
    if done.returncode == 0:
        same(ours, theirs)
    return done.returncode, done.stderr


@hostrun.needs("asan")
def test_address_sanitizer_finds_nothing_but_an_overrun(tmp_path: Path) -> None:
    code, said = apart(tmp_path, "asan", None, seed=7)
    assert code == 0, said
    fault = (KERNEL, "to[j] = 32 * j + lane < left", "to[j] = 32 * j + lane <= left")
    code, said = apart(tmp_path, "asan", fault)
    assert code != 0
    assert "AddressSanitizer: heap-buffer-overflow" in said, said


@hostrun.needs("tsan")
@pytest.mark.parametrize("fault", ["", "step", "barrier"])
def test_thread_sanitizer(fault: str, tmp_path: Path) -> None:
    """Warps that take the same block write to one place; so do sums that nobody waited for."""
    planted = {
        "": None,
        "step": (KERNEL, "first + warp", "first + warp / 2"),
        "barrier": (KERNEL, BARRIER, ""),
    }[fault]
    if fault == "barrier":
        library = hostrun.build(SOURCE, "tsan", planted)
        given = (torch.ones(600), 600, 1, torch.ones(3), 3, 1, torch.zeros(2).double())
        norm = torch.zeros(()).double()
        done = hostrun.call_apart(
            library, "run_norm", *given, norm, folder=tmp_path, sanitize="tsan"
        )
        code, said = done.returncode, done.stderr
    else:
        code, said = apart(tmp_path, "tsan", planted)
    assert code == (66 if fault else 0), said
    assert ("ThreadSanitizer: data race" in said) == bool(fault)
