"""The ways of tests/support/backends.py are taken, left again, and a stand-in is seen."""

from __future__ import annotations

import pytest
import torch

import bigops
from bigops import backend
from tests.support.backends import CPU, REFERENCE, TRITON, Way
from tests.support.kernels_ran import needs_extension

pytestmark = needs_extension
X, W = torch.randn(3, 4), torch.randn(5, 4)


def ran() -> list[str]:
    with backend.record() as names:
        bigops.fused_linear(X, W)
    return names


@pytest.mark.parametrize("way", [REFERENCE, TRITON, *CPU[:1]], ids=str)
def test_a_way_is_left_again(way: Way) -> None:
    before = ran()
    with way.taken("fused_linear"):
        inside = ran()
    assert ran() == before
    assert inside != before or way in CPU


def test_a_failed_test_leaves_its_way_too() -> None:
    before = ran()
    with pytest.raises(ZeroDivisionError), TRITON.taken("fused_linear"):
        _ = 1 / 0
    assert ran() == before


@pytest.mark.parametrize("way", [REFERENCE, TRITON, *CPU[:1]], ids=str)
def test_a_call_that_another_way_serves_is_seen(way: Way) -> None:
    other = TRITON if way is REFERENCE else REFERENCE
    with (
        pytest.raises(AssertionError, match="fused_linear"),
        way.serving("fused_linear"),
        other.taken("fused_linear"),
    ):
        bigops.fused_linear(X, W)


def test_no_call_at_all_is_seen() -> None:
    with pytest.raises(AssertionError), TRITON.serving("fused_linear"):
        pass


def test_a_backward_that_did_not_run_is_seen() -> None:
    with (
        pytest.raises(AssertionError, match="no backward"),
        TRITON.serving("fused_linear", gradients=True),
    ):
        bigops.fused_linear(X, W)


def test_a_missing_dtype_in_the_name_is_seen() -> None:
    with pytest.raises(AssertionError, match="'f16'"), TRITON.serving("fused_linear", "f16"):
        bigops.fused_linear(X, W)
