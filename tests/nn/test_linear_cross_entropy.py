"""bigops.nn.LinearCrossEntropy: a drop-in for nn.Linear with nn.CrossEntropyLoss."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import bigops
from bigops.nn import LinearCrossEntropy
from tests.support.cases.cross_entropy import ALL, Case
from tests.support.kernels_ran import expect, needs_extension


def case_of(layer: LinearCrossEntropy, lead: tuple[int, ...]) -> Case:
    """The layer's call as a case: its truth is torch's linear and cross_entropy."""
    bias = None if layer.bias is None else layer.bias.detach()
    names = ("ignore_index", "reduction", "label_smoothing", "z_loss", "softcap", "class_weight")
    return Case(
        torch.randn(*lead, layer.in_features).to(layer.weight.dtype),
        layer.weight.detach(),
        bias,
        torch.randint(0, layer.out_features, lead),
        {name: getattr(layer, name) for name in names},
    )


@needs_extension
@pytest.mark.parametrize("options", ALL.values(), ids=list(ALL))
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients(bias: bool, options: dict[str, Any]) -> None:
    options = dict(options)
    if options.get("class_weight"):
        options["class_weight"] = torch.rand(33)
    layer = LinearCrossEntropy(20, 33, bias, **options)
    case = case_of(layer, (3, 5))
    x = case.x.clone().requires_grad_()
    with expect("linear_cross_entropy.f32.gradient"):
        loss = layer(x, case.target)
        grads = list(torch.autograd.grad(loss, [x, *layer.parameters()], case.grad))
    case.check_loss(loss)
    case.check_gradients(grads if bias else [*grads, None])


def test_state_dict_is_that_of_nn_linear_both_ways() -> None:
    ours, theirs = LinearCrossEntropy(6, 4, class_weight=torch.rand(4)), nn.Linear(6, 4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    theirs.load_state_dict(LinearCrossEntropy(6, 4).state_dict())
    assert not torch.equal(ours.weight, theirs.weight)


def test_initialisation_is_that_of_nn_linear() -> None:
    torch.manual_seed(3)
    theirs = nn.Linear(7, 5)
    torch.manual_seed(3)
    ours = LinearCrossEntropy(7, 5, softcap=3.0)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_from_linear_shares_parameters_and_takes_the_loss_over() -> None:
    linear = nn.Linear(6, 4).eval()
    linear.weight.requires_grad_(False)
    loss = nn.CrossEntropyLoss(torch.rand(4), ignore_index=2, reduction="sum", label_smoothing=0.1)
    state = torch.get_rng_state()
    ours = LinearCrossEntropy.from_linear(linear, loss, z_loss=0.0)
    assert torch.equal(state, torch.get_rng_state())
    assert ours.weight is linear.weight
    assert ours.bias is linear.bias
    assert not ours.training
    x, target = torch.randn(9, 6), torch.randint(0, 4, (9,))
    torch.testing.assert_close(ours(x, target), loss(linear(x), target))
    assert LinearCrossEntropy.from_linear(linear, loss, reduction="none")(x, target).shape == (9,)
    assert LinearCrossEntropy.from_linear(nn.Linear(6, 4, bias=False)).bias is None


def test_training_goes_where_torch_goes() -> None:
    """Five optimiser steps of our layer and of torch's pair end at the same weights."""
    torch.manual_seed(0)
    linear, loss = nn.Linear(8, 11).double(), nn.CrossEntropyLoss(label_smoothing=0.1)
    ours = LinearCrossEntropy.from_linear(copy.deepcopy(linear), loss)
    first, second = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (linear, ours))
    for _ in range(5):
        x, target = torch.randn(16, 8).double(), torch.randint(0, 11, (16,))
        for optimizer, call in (
            (first, lambda x, t: loss(linear(x), t)),
            (second, ours),
        ):
            optimizer.zero_grad()
            call(x, target).backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, linear.weight)
    torch.testing.assert_close(ours.bias, linear.bias)


def test_logits_are_those_of_the_loss() -> None:
    layer = LinearCrossEntropy(6, 4, softcap=2.0)
    x, target = torch.randn(9, 6), torch.randint(0, 4, (9,))
    assert layer.logits(x).abs().max() < 2
    want = nn.functional.cross_entropy(layer.logits(x), target)
    torch.testing.assert_close(layer(x, target), want)
    layer.softcap = None
    torch.testing.assert_close(layer.logits(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_compiled_copied_pickled_moved() -> None:
    layer = LinearCrossEntropy(6, 4, class_weight=torch.rand(4))
    x, target = torch.randn(9, 6), torch.randint(0, 4, (9,))
    want = layer(x, target)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, target), want)
    assert torch.equal(copy.deepcopy(layer)(x, target), want)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x, target), want)
    assert layer.double()(x.double(), target).dtype == torch.float64
    assert layer.class_weight is not None
    assert layer.class_weight.dtype == torch.float64


def test_fuse_leaves_it_alone() -> None:
    model = nn.Sequential(LinearCrossEntropy(6, 4), nn.ReLU())
    bigops.fuse_(model)
    assert type(model[0]) is LinearCrossEntropy


def test_repr_names_what_is_not_the_default() -> None:
    assert repr(LinearCrossEntropy(6, 4, softcap=2.0, class_weight=torch.rand(4))) == (
        "LinearCrossEntropy(in_features=6, out_features=4, bias=True, softcap=2.0, "
        "class_weight=given)"
    )


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="out_features: expected at least 0; got -1"):
        LinearCrossEntropy(6, -1)
    with pytest.raises(ValueError, match="reduction: expected one of mean, sum, none; got 'max'"):
        LinearCrossEntropy(6, 4, reduction="max")
    with pytest.raises(ValueError, match="softcap: expected a positive finite number"):
        LinearCrossEntropy(6, 4, softcap=-1.0)
    with pytest.raises(TypeError, match="ignore_index: expected an int; got str"):
        LinearCrossEntropy(6, 4, ignore_index="pad")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"class_weight: expected shape \[4\]; got \[3\]"):
        LinearCrossEntropy(6, 4, class_weight=torch.rand(3))
    with pytest.raises(TypeError, match=r"linear: expected a torch.nn.Linear; got ReLU"):
        LinearCrossEntropy.from_linear(nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"loss: expected a torch.nn.CrossEntropyLoss; got ReLU"):
        LinearCrossEntropy.from_linear(nn.Linear(6, 4), nn.ReLU())  # type: ignore[arg-type]
