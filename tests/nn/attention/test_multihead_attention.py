"""bigops.nn.MultiheadAttention against torch's: every way to call it, its keys, its projections."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigops.nn import LowRankLinear, MultiheadAttention, QuantLinear, SparseLinear
from tests.support import tolerance

E, H, B, L, S = 48, 4, 2, 5, 7


def pair(batch_first: bool = True, bias: bool = True) -> tuple[nn.MultiheadAttention, Any]:
    """torch's, and ours with its Parameters; the biases are no zeros."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, bias=bias, batch_first=batch_first).eval()
    for name, p in theirs.named_parameters():
        if "bias" in name:
            nn.init.normal_(p)
    return theirs, MultiheadAttention.from_torch(theirs)


def calls(batch_first: bool) -> list[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    torch.manual_seed(1)
    q, k, v = torch.randn(B, L, E), torch.randn(B, S, E), torch.randn(B, S, E)
    padding, own = torch.zeros(B, S, dtype=torch.bool), torch.zeros(B, L, dtype=torch.bool)
    padding[0, 5:], own[1, 3:] = True, True
    causal = torch.triu(torch.ones(L, L, dtype=torch.bool), 1)
    alone = (q[0], q[0], q[0])
    if not batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    soft = torch.zeros(B, S).masked_fill(padding, -1e4)
    return [
        ((q, q, q), {}),
        ((q, q, q), {"key_padding_mask": own}),
        ((q, q, q), {"attn_mask": causal, "is_causal": True}),
        ((q, q, q), {"attn_mask": causal, "key_padding_mask": own, "is_causal": True}),
        ((q, k, k), {"key_padding_mask": padding}),
        ((q, k, v), {"attn_mask": torch.randn(L, S)}),
        ((q, k, v), {"attn_mask": torch.randn(B * H, L, S), "key_padding_mask": soft}),
        (alone, {"key_padding_mask": own[1]}),
        (alone, {"attn_mask": torch.randn(H, L, L)}),
    ]


def hold(got: Any, theirs: nn.MultiheadAttention, args: Any, given: dict[str, Any]) -> None:
    """Result and weights held to the rule."""
    exact = copy.deepcopy(theirs).double()
    floating = {n for n in given if isinstance(given[n], Tensor) and given[n].is_floating_point()}
    wide = {**given, **{n: given[n].double() for n in floating}}
    doubled = {id(x): x.double() for x in args}  # the same tensors stay the same
    with torch.no_grad():
        truth = exact(*(doubled[id(x)] for x in args), **wide)
        plain = theirs(*args, **given)
    assert (got[1] is None) == (plain[1] is None)
    for one, whole, other, scale in zip(got, truth, plain, scales(exact, args), strict=True):
        if one is not None:
            tolerance.check(one, whole, other, scale)


def scales(exact: nn.MultiheadAttention, args: Any) -> tuple[float, float]:
    """Bounds of what is summed for the result, and for the scores behind a weight."""
    rows = exact.in_proj_weight.detach().abs()  # type: ignore[union-attr]
    bias = exact.in_proj_bias
    biases = torch.zeros(3 * E) if bias is None else bias.detach().abs()
    parts = zip(args, rows.chunk(3), biases.chunk(3), strict=True)
    q, k, v = (float((x.double().abs() @ w.t() + b).max()) for x, w, b in parts)
    out = exact.out_proj
    added = 0.0 if out.bias is None else float(out.bias.abs().max())
    return v * float(out.weight.abs().sum(1).max()) + added, q * k * (E // H) ** 0.5


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_every_call(batch_first: bool, bias: bool, need_weights: bool) -> None:
    theirs, ours = pair(batch_first, bias)
    for args, given in calls(batch_first):
        for average in (True, False):
            asked = {**given, "need_weights": need_weights, "average_attn_weights": average}
            with torch.no_grad():
                got = ours(*args, **asked)
            hold(got, theirs, args, asked)


@pytest.mark.parametrize(
    "swap",
    [
        lambda layer: QuantLinear.from_linear(layer, bits=4, group=32).freeze(),
        lambda layer: QuantLinear.from_linear(layer, bits=8, activations="none").freeze(),
        lambda layer: SparseLinear.from_linear(layer, 0.5, values="fp32").freeze(),
        lambda layer: LowRankLinear.from_linear(layer, 16),
    ],
    ids=["int4", "int8", "sparse", "low rank"],
)
def test_any_projection_is_called(swap: Any) -> None:
    """Held to torch's with the dequantised weights, thirds of it for keys of other tensors, too."""
    theirs, ours = pair()
    ours.in_proj, ours.out_proj = swap(ours.in_proj), swap(ours.out_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.in_proj.weight)  # type: ignore[union-attr]
        theirs.out_proj.weight.copy_(ours.out_proj.weight)
    for args, given in calls(True):
        with torch.no_grad():
            hold(ours(*args, **given), theirs, args, given)
    assert ours.in_proj_weight.shape == (3 * E, E)


def test_keys_are_those_of_torch() -> None:
    theirs, ours = pair()
    host, ours_in = nn.Sequential(theirs), nn.Sequential(ours)
    assert {*ours_in.state_dict()} == {*host.state_dict()}
    other = nn.Sequential(MultiheadAttention(E, H, batch_first=True)).eval()
    other.load_state_dict(host.state_dict())
    host.load_state_dict(other.state_dict())
    x = torch.randn(B, L, E)
    assert torch.equal(other[0](x, x, x)[0], ours(x, x, x)[0])
    ours.in_proj = QuantLinear.from_linear(ours.in_proj).freeze()
    assert {*ours_in.state_dict()} == {
        *("0.in_proj.values", "0.in_proj.scale", "0.in_proj.row_sum", "0.in_proj.bias"),
        *("0.out_proj.weight", "0.out_proj.bias"),
    }
    twin = copy.deepcopy(ours_in)
    twin.load_state_dict(ours_in.state_dict())
    assert torch.equal(twin[0](x, x, x)[0], ours(x, x, x)[0])
    with pytest.raises(RuntimeError, match=r"in_proj\.weight"):
        twin.load_state_dict(host.state_dict())
    again = MultiheadAttention.from_arguments(ours.arguments())
    assert again.arguments() == ours.arguments()


def test_training() -> None:
    theirs, ours = pair()
    x = torch.randn(B, L, E)
    grads = []
    for layer in (theirs.train(), ours.train()):
        leaf = x.clone().requires_grad_()
        layer(leaf, leaf, leaf, need_weights=False)[0].square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])
    assert theirs.in_proj_weight is ours.in_proj.weight  # one Parameter, with both gradients
    dropping = MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    assert not torch.equal(dropping(x, x, x)[0], dropping(x, x, x)[0])
    assert torch.equal(dropping.eval()(x, x, x)[0], dropping(x, x, x)[0])


def test_compiled() -> None:
    _, ours = pair()
    ours.in_proj = QuantLinear.from_linear(ours.in_proj, bits=4, group=None).freeze()
    run = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = torch.randn(B, L, E)
    with torch.no_grad():
        torch.testing.assert_close(run(x, x, x)[0], ours(x, x, x)[0])


def test_a_nested_tensor() -> None:
    _, ours = pair()
    rows = [torch.randn(n, E) for n in (3, 5)]
    nested = torch.nested.as_nested_tensor(rows)
    with torch.no_grad():
        y, weights = ours(nested, nested, nested, need_weights=False)
        assert weights is None
        for row, got in zip(rows, y.unbind(), strict=True):
            alone = row.unsqueeze(0)
            torch.testing.assert_close(got, ours(alone, alone, alone)[0][0])
        with pytest.raises(ValueError, match="query: expected a dense tensor, or a nested one"):
            ours(nested, nested, nested)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kdim": 8}, "a width of their own"),
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
    ],
)
def test_what_is_more(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"two projections; .*{said}"):
        MultiheadAttention.from_torch(nn.MultiheadAttention(E, H, **given))


def test_errors() -> None:
    with pytest.raises(ValueError, match="embed_dim, num_heads: expected at least 1 and heads"):
        MultiheadAttention(10, 3)
    x = torch.randn(B, L, E)
    with pytest.raises(ValueError, match="attn_mask: expected a mask beside the hint"):
        pair()[1](x, x, x, is_causal=True)
