"""DTensor: rows that lie on several ranks are normed where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bigops.ops.norm.schema import ACT_QUANT
from bigops.ops.norm.sharding import rules_of
from bigops.parallel.sharding import register_sharding_rules
from tests.ops.norm.test_paths import OPS, call, equal
from tests.support.cases.norm import make

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """Of this process alone: placements and their rules are those of any number."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("op", OPS)
def test_rows_stay_where_they_are(op: str, mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    register_sharding_rules()
    case = make([4, 3], 9, residual=True)
    for dim in (0, 1):
        rows, whole = [Shard(dim)], [Replicate()]
        given = [
            distribute_tensor(t, mesh, where)
            for t, where in zip(case.tensors, (rows, whole, whole, rows), strict=True)
        ]
        with torch.no_grad(), CommDebugMode() as traffic:
            found = call(op, *given)
        assert traffic.get_total_counts() == 0
        assert all(list(t.placements) == rows for t in found)  # type: ignore[attr-defined]
        equal(tuple(t.full_tensor() for t in found), call(op, *case.tensors))  # type: ignore[attr-defined]


def test_what_is_not_kept_is_whole() -> None:
    from torch.distributed.tensor import Replicate, Shard

    rules = dict(rules_of())[ACT_QUANT]
    x = torch.empty(4, 3, 9)
    found = rules(x, None, None, None, 1e-5, "layer", False, True, False)
    assert [results for results, _ in found] == [
        [where] * 4 + [Replicate()] for where in (Replicate(), Shard(0), Shard(1))
    ]
