"""The numerics rule fails where it must: a rule that a wrong kernel passes is a defect."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.support.cases.linear import make
from tests.support.tolerance import C, bound, check, snr_db

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [8, 100, 1000])
def test_plain_torch_passes(dtype: torch.dtype, k: int) -> None:
    case = make(9, 11, k, dtype, "gelu")
    y, grads = case.plain(dtype)
    case.check_forward(y)
    case.check_gradients(grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_element_fails(dtype: torch.dtype) -> None:
    case = make(9, 11, 100, dtype)
    y = case.plain(dtype)[0]
    y[3, 4] += (40 * torch.finfo(dtype).eps * case.scales()[0][3, 4]).to(dtype)
    with pytest.raises(AssertionError, match=r"element 37 .* \(1 of 99 too far\)"):
        case.check_forward(y)


def test_a_forgotten_term_fails() -> None:
    """One of 1000 products left out: the fault of a loop that stops one short."""
    case = make(4, 5, 1000, torch.bfloat16, bias=False, residual=False)
    case.x[:, -1] = 1.0
    case.weight[:, -1] = 1.0
    short = F.linear(case.x[:, :-1], case.weight[:, :-1])
    with pytest.raises(AssertionError, match="too far"):
        case.check_forward(short)


def test_a_sum_held_in_bf16_fails() -> None:
    case = make(4, 5, 1000, torch.bfloat16, bias=False, residual=False)
    total = torch.zeros(4, 5, dtype=torch.bfloat16)
    for i in range(1000):
        total += case.x[:, i : i + 1] * case.weight[:, i]
    with pytest.raises(AssertionError, match="too far"):
        case.check_forward(total)


def test_nan_elsewhere_fails() -> None:
    case = make(2, 3, 4)
    y = case.plain(torch.float32)[0]
    y[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="NaN at other places"):
        case.check_forward(y)


def test_dtype_and_shape_are_part_of_the_rule() -> None:
    case = make(2, 3, 4, torch.bfloat16)
    y, ref = case.plain(torch.bfloat16)[0], case.plain(torch.float64)[0]
    with pytest.raises(AssertionError, match="dtype"):
        check(y.float(), ref, y, 1.0)
    with pytest.raises(AssertionError, match="shape"):
        check(y[:1], ref, y, 1.0)
    with pytest.raises(AssertionError, match="must be float64"):
        check(y, ref.float(), y, 1.0)


def test_a_wrong_tolerance_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a constant so large that the rule passes a wrong kernel.

    The allowance must stay far below the values themselves, or it holds nothing.
    """
    case = make(9, 11, 100)
    y, ref = case.plain(torch.float32)[0], case.plain(torch.float64)[0]

    def share() -> float:
        return float((bound(ref, y, case.scales()[0]) / ref.abs().mean()).max())

    assert share() < 1e-3
    monkeypatch.setitem(C, torch.float32, 1e6)
    with pytest.raises(AssertionError):
        assert share() < 1e-3


def test_snr_in_db() -> None:
    ref = torch.ones(1000)
    assert snr_db(ref * 1.01, ref) == pytest.approx(40, abs=0.01)
