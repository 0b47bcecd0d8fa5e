"""Criterion, quantiser and storage are three: another of the first two is a function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigops import Int8, Sparse, compress_
from bigops.compress.criteria import magnitude
from bigops.compress.quantizers import round_to_nearest
from bigops.formats import Fp8Weight, Pattern, QuantizedWeight
from bigops.nn import QuantLinear, SparseLinear


def first_columns(weight: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """A criterion: what stands first in its row stays."""
    mask = torch.zeros(pattern.mask_shape(*weight.shape), dtype=torch.bool)
    mask[:, : round((1 - sparsity) * mask.shape[1])] = True
    return mask


@dataclass(frozen=True)
class First(Sparse):
    criterion = staticmethod(first_columns)


def towards_zero(layer: QuantLinear) -> QuantizedWeight:
    """A quantiser: the codes are its own, the scales those of rounding to nearest."""
    nearest = round_to_nearest(layer)
    scale = nearest.codes().scale
    codes = (layer.weight.detach() / scale).trunc()
    form = {"activations": layer.activations, "bits": layer.bits, "group": layer.group}
    return QuantizedWeight.from_codes(codes, scale, **form)


@dataclass(frozen=True)
class Truncated(Int8):
    quantizer = staticmethod(towards_zero)


def test_a_criterion_chooses_what_stays() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    weight = model[0].weight.detach().clone()
    compress_(model, First(0.5), keep="all", freeze=False)
    assert torch.equal(model[0].dense_weight()[:, :8], weight[:, :8])
    assert not model[0].dense_weight()[:, 8:].any()
    both = nn.Sequential(nn.Linear(16, 8))
    compress_(both, First(0.5) + Int8(), keep="all", freeze=False)
    assert not both[0].mask[:, 2:].any()
    # what is dropped does not come back, whoever chooses next
    again = SparseLinear.from_linear(model[0], 0.25, "1x1")
    assert not again.mask[:, 8:].any()
    assert torch.equal(
        magnitude(weight, Pattern.parse("2:4"), 0.5), Pattern.parse("2:4").mask(weight, None)
    )


def test_a_quantiser_chooses_the_codes() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 8))
    twin = nn.Sequential(model[0])
    compress_(model, Truncated(), keep="all")
    compress_(twin, Int8(), keep="all")
    mine, nearest = model[0].dense_weight(), twin[0].dense_weight()
    assert not torch.equal(mine, nearest)
    assert bool((mine.abs() <= nearest.abs()).all())


def test_a_storage_of_another_form_is_refused() -> None:
    layer = QuantLinear(16, 8)
    weight = layer.weight.detach()
    for storage, error, message in (
        (QuantizedWeight.from_dense(weight, bits=4), ValueError, "expected the form of the layer"),
        (QuantizedWeight.from_dense(weight[:4], activations="dynamic"), ValueError, "got"),
        (Fp8Weight.from_dense(weight), TypeError, "storage: expected a QuantizedWeight; got a Fp8"),
    ):
        with pytest.raises(error, match=message):
            layer.freeze(storage)
        assert not layer.frozen
