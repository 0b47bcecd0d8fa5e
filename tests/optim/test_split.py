"""Parameters that are DTensors: FSDP2 and columns on two ranks have the bits of one process, and
states go from two ranks to one and back through torch.distributed.checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.kernels_ran import needs_extension, threads
from tests.support.optimizer_ways import same
from tests.support.ranks import run_ranks

pytestmark = [
    needs_extension,
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]
FORMS = ("stochastic", "8 bit", "masters", "momentum", "fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process has, saved whole after 3 steps, and then what two ranks have."""
    from tests.optim import split_worker as worker

    folder = tmp_path_factory.mktemp("split")
    with threads(1):
        for form in FORMS:
            model, optimizer = worker.straight(form, 3, False)
            worker.saved(model, optimizer, folder / f"{form} whole")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, folder / f"{form}.pt")
    run_ranks("-m", "tests.optim.split_worker", str(folder))
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "results.pt", weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", FORMS)
def test_fsdp_has_the_bits_of_one_process(form: str, folder: Path, seen: dict[str, Any]) -> None:
    from tests.optim import split_worker as worker

    one = worker.seen(*worker.straight(form, 5, False))
    got = seen[form]
    assert set(got["kinds"].values()) == {"DTensor"}
    assert same(got["straight"]["weights"], one["weights"])
    assert same(got["straight"]["states"], one["states"])
    assert not same(one["weights"], worker.seen(*worker.straight(form, 4, False))["weights"])


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_to_one_to_two(form: str, folder: Path, seen: dict[str, Any]) -> None:
    """2 -> 2, 1 -> 2 in the worker (also from a plain file), 2 -> 1 here: all go on to the same."""
    from tests.optim import split_worker as worker

    want = seen[form]["straight"]
    assert same(seen[form]["again"], want)
    assert same(seen[form]["back"], want)
    assert same(seen[form]["plain"], want)
    one = worker.loaded(form, folder / f"{form} split", False)
    worker.run(*one, range(3, 5))
    assert same(worker.seen(*one), want)


def test_columns_and_what_is_refused(seen: dict[str, Any]) -> None:
    got = seen["tensor parallel"]
    assert same(got["split"], got["plain"])
    blocks, moved = got["said"]
    assert blocks.startswith(
        "eight_bit: expected a parameter split between rows (dimensions below 1) or after whole "
        "blocks of 256; got S(1) of shape [9, 700] over 2 ranks"
    )
    assert moved.startswith("params: expected what exp_avg was made for, a plain tensor; got a")


def test_step_in_backward_under_fsdp(seen: dict[str, Any]) -> None:
    ordinary, hooked, refused = seen["in backward"]
    assert same(ordinary, hooked)
    assert refused.startswith(
        "param_groups[0]['params'][0]: expected a DTensor among 2 ranks; got a plain parameter"
    )
