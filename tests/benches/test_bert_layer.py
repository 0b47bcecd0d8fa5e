"""The BERT layer's case: ours are two, the sparse one is held against the pruned model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bigops.benches import bench_bert_layer, harness, rivals_bert, rivals_onnx, rivals_openvino
from bigops.benches.harness import Case, Side
from bigops.benches.rows import is_own
from tests.support import tolerance


@pytest.fixture(scope="module")
def built() -> Iterator[tuple[list[Tensor], dict[str, Side]]]:
    torch.manual_seed(0)
    case = replace(bench_bert_layer.cases()[1], m=64, k=128, n=256)  # eight times eight tokens
    with torch.inference_mode():
        reference, sides = bench_bert_layer.build(case, "cpu")
        yield reference, {side.provider: side for side in sides}


def test_ours_are_two_and_all_others_are_rivals(
    built: tuple[list[Tensor], dict[str, Side]],
) -> None:
    _, sides = built
    ours = [name for name in sides if is_own(name)]
    assert ours == ["bigops int8", "bigops sparse int8 80%"]
    assert {"eager", "torch.compile", "torch.compile bf16", "torch int8"} <= set(sides)
    wanted = [f"openvino {form}" for form in rivals_bert.OPENVINO]
    assert all((name in sides) == rivals_openvino.available() for name in wanted)
    assert ("onnxruntime int8 static" in sides) == rivals_onnx.available()


def test_the_sparse_form_is_near_the_pruned_model_and_far_from_the_dense_one(
    built: tuple[list[Tensor], dict[str, Side]],
) -> None:
    reference, sides = built
    sparse = sides["bigops sparse int8 80%"]
    assert sparse.reference is not None
    out = sparse.call()
    assert isinstance(out, Tensor)
    assert tolerance.snr_db(out, sparse.reference[0]) > 30
    assert tolerance.snr_db(out, reference[0]) < 30


def test_a_side_is_judged_by_its_own_reference() -> None:
    cost = bench_bert_layer.Cost("fp32", 1.0, 1.0)

    def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
        x = torch.ones(2, 2)
        own = Side("bigops half", lambda: x / 2, cost, reference=[x.double() / 2])
        return [x.double()], [own, Side("eager", lambda: x.clone(), cost)]

    found = harness.run_case(Case("an_op", "c", 2, 2, 2), build, harness.Limits(), pairs=2)
    assert [row.rel_error for row in found] == [0, 0]
