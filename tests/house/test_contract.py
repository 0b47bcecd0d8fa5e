"""Every layer in every place that `nn.Linear` fits in: the table of `contract`."""

from __future__ import annotations

import re

import pytest

from tests.house.contract import CELLS, LAYERS, MAY_RAISE, QUICK, SLOW


def run(layer: str, cell: str) -> None:
    reason = MAY_RAISE.get((layer, cell))
    if reason is None:
        CELLS[cell](layer)
        return
    said, why = reason
    assert why
    with pytest.raises(Exception, match=".") as told:
        CELLS[cell](layer)
    assert re.search(said, str(told.value)), str(told.value)


@pytest.mark.parametrize("cell", QUICK)
@pytest.mark.parametrize("layer", LAYERS)
def test_quick(layer: str, cell: str) -> None:
    run(layer, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", SLOW)
@pytest.mark.parametrize("layer", LAYERS)
def test_slow(layer: str, cell: str) -> None:
    run(layer, cell)


def test_the_list_names_what_is_there() -> None:
    assert {layer for layer, _ in MAY_RAISE} <= set(LAYERS)
    assert {cell for _, cell in MAY_RAISE} <= set(CELLS)
