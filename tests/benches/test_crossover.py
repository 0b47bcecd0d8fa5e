"""benches/crossover.py: where a pattern starts to win, from rows with known times."""

from __future__ import annotations

import pytest

from bigops.benches import crossover


def _row(sparsity: float, provider: str, us: float, m: int = 16) -> dict[str, str]:
    params = f"activation=none sparsity={sparsity} values=int8 pattern=1x4"
    return {"params": params, "m": str(m), "provider": provider, "median_us": str(us)}


def test_first_win_needs_all_higher_ones_to_win() -> None:
    rows = []
    for sparsity, ours in ((0.5, 90.0), (0.7, 110.0), (0.8, 80.0), (0.9, 40.0)):
        rows += [_row(sparsity, "bigops", ours), _row(sparsity, "eager", 400.0)]
        rows += [_row(sparsity, "onednn", 100.0), _row(sparsity, "torch csr", 10.0)]
    rows += [_row(0.9, "bigops", 50.0, 1), _row(0.9, "eager", 25.0, 1)]
    found = crossover.ratios(rows)
    assert found["int8", "1x4", 16] == {0.5: 100 / 90, 0.7: 100 / 110, 0.8: 1.25, 0.9: 2.5}
    text = crossover.table(found)
    assert "| int8 | 1x4 | never (0.50x at 90%) | 80% (1.25x) |" in text


def test_rows_of_another_op_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the CSV of sparse_linear cases"):
        crossover.ratios([{"params": "activation=none", "m": "1", "provider": "x"}])
