"""What the recipe ddp calls equal losses; its runs are in test_run.py."""

import pytest

from bigops.recipes.ddp import LEGS, compared

LOSSES = [[1, 2.5], [2, 2.25], [3, 1.0]]


def curves(**changed: list[list[float]]) -> dict[str, list[list[float]]]:
    return {leg: changed.get(leg, LOSSES) for leg in LEGS}


def test_a_loss_that_differs_by_more_than_rounding_misses_the_bar() -> None:
    assert compared(curves())["difference"] == 0
    for leg in ("spawn", "torchrun"):
        near = [*LOSSES[:2], [3, 1.0 + 2**-52]]
        assert 0 < compared(curves(**{leg: near}))["difference"] < 1
        far = [*LOSSES[:2], [3, 1.0 + 1e-12]]
        assert compared(curves(**{leg: far}))["difference"] > 1
        # as far as torch's own layers and optimiser are: rounding, not a fault
        assert compared(curves(**{leg: far, "torch": far}))["difference"] < 1


def test_legs_of_other_steps_are_an_error() -> None:
    with pytest.raises(ValueError, match="spawn: expected the steps of one process; got 2 points"):
        compared(curves(spawn=LOSSES[:2]))
    with pytest.raises(ValueError, match="torchrun: expected the steps"):
        compared(curves(torchrun=[[i + 1, loss] for i, loss in LOSSES]))
