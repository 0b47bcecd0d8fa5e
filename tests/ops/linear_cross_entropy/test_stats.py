"""linear_cross_entropy with statistics: z-loss, accuracy and predictions of the same chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.nn import LinearCrossEntropy
from bigops.ops.linear_cross_entropy import CrossEntropyStats, chunked, linear_cross_entropy
from tests.support.backends import CPU, REFERENCE, TRITON, Way
from tests.support.cases.cross_entropy import ALL, SOFT, Case, make
from tests.support.kernels_ran import needs_extension

pytestmark = needs_extension
EVERY = {**ALL, **SOFT}
# class probabilities are served by the reference alone
WAYS = [(way, name) for way in (REFERENCE, *CPU, TRITON) for name in ALL]
WAYS += [(REFERENCE, name) for name in SOFT]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "SMALL", 0)


def stats_of(case: Case) -> Callable[..., CrossEntropyStats]:
    def f(x: Tensor, weight: Tensor, bias: Tensor | None) -> CrossEntropyStats:
        options = {**case.options, "return_stats": True}
        return linear_cross_entropy(x, weight, case.target, bias, **options)  # type: ignore[no-any-return]

    return f


def without(case: Case, name: str) -> Case:
    return Case(case.x, case.weight, case.bias, case.target, {**case.options, name: 0.0})


def check(case: Case, got: CrossEntropyStats, what: str = "") -> None:
    """Statistics by torch in float64; predictions and accuracy are exact where logits differ."""
    case.check_loss(got.loss, what)
    bias = None if case.bias is None else case.bias.double()
    logits = F.linear(case.x.double(), case.weight.double(), bias)
    assert torch.equal(got.predictions, logits.argmax(-1)), what
    if case.soft:
        right = (got.predictions == case.target.argmax(-1)).double()
        kept = torch.ones_like(right)
    else:
        right = (got.predictions == case.target).double()
        kept = (case.target != case.options.get("ignore_index", -100)).double()
    torch.testing.assert_close(got.accuracy.double(), (right * kept).sum() / kept.sum())
    if not case.options.get("z_loss"):
        assert torch.equal(got.z_loss, torch.zeros_like(got.loss))
    # the loss without it, by the rule
    without(case, "z_loss").check_loss(got.loss - got.z_loss, f"{what} without z-loss")
    assert not any(t.requires_grad for t in got[1:])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("way", "name"), WAYS, ids=str)
def test_every_kernel(way: Way, name: str) -> None:
    case = make([3, 11], 133, 9, **EVERY[name])
    with way.taken("linear_cross_entropy"):
        leaves = case.leaves()
        got = stats_of(case)(*leaves)
        check(case, got, str(way))
        wanted = [t for t in leaves if t is not None]
        case.check_gradients(torch.autograd.grad(got.loss, wanted, case.grad), str(way))
        with torch.no_grad():
            got = stats_of(case)(*leaves)
        check(case, got, "without a graph")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    case = make(40, 33, 20, dtype, z_loss=0.05)
    logits = F.linear(case.x, case.weight).double() + case.bias.double()  # type: ignore[union-attr]
    got = stats_of(case)(*case.leaves())
    case.check_loss(got.loss)
    # the largest of what was stored, a rounding of the bias apart
    best = logits.gather(1, got.predictions.unsqueeze(1))[:, 0]
    assert bool((best >= logits.amax(1) * (1 - 2 * torch.finfo(dtype).eps)).all())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("path", ["compiled", "exported", "vmap", "jvp", "grad"])
def test_paths(path: str, reduction: str) -> None:
    case = make([3, 4], 7, 5, torch.float64, reduction=reduction, z_loss=0.1, ignored=0.0)
    f = stats_of(case)
    leaves = [t.detach() for t in case.leaves()]  # type: ignore[union-attr]
    if path == "compiled":
        torch._dynamo.reset()
        own = case.leaves()
        got = torch.compile(f, fullgraph=True, backend="aot_eager")(*own)
        case.check_gradients(torch.autograd.grad(got.loss, own, case.grad))  # type: ignore[arg-type]
    elif path == "exported":

        class Model(torch.nn.Module):
            def forward(self, *args: Tensor) -> CrossEntropyStats:
                return f(*args)

        got = torch.export.export(Model(), tuple(leaves), strict=False).module()(*leaves)
    elif path == "vmap":
        one = lambda x, target: linear_cross_entropy(  # noqa: E731
            x, case.weight, target, case.bias, **case.options, return_stats=True
        )
        parts = torch.vmap(one)(case.x, case.target)
        if reduction == "mean":
            got = CrossEntropyStats(*(t.mean() for t in parts[:3]), parts.predictions)
        else:
            got = parts._replace(accuracy=parts.accuracy.mean())
    elif path == "jvp":
        got, _ = torch.func.jvp(lambda x: f(x, *leaves[1:]), (leaves[0],), (leaves[0],))
        got = CrossEntropyStats(*got)
    else:

        def total(x: Tensor) -> tuple[Tensor, CrossEntropyStats]:
            found = f(x, *leaves[1:])
            return (found.loss * case.grad).sum(), found

        grad, got = torch.func.grad(total, has_aux=True)(leaves[0])
        case.check_gradients([grad, *case.plain(torch.float64)[1][1:]])
    check(case, got, path)


def test_predictions_at_the_edges() -> None:
    """The first of equals, a NaN before all, those of ignored tokens too; as torch.argmax."""
    logits = torch.tensor([[0.0, 2, 2, 1], [float("nan"), 3, float("nan"), 9], [-1, -1, -1, -1]])
    logits = torch.cat([logits, torch.tensor([[0, float("inf"), 1, float("inf")]])])
    for ignored in (False, True):
        target = torch.full((4,), -100 if ignored else 1)
        got = linear_cross_entropy(logits, torch.eye(4), target, return_stats=True)
        # the product spreads a NaN over its row
        assert got.predictions.tolist()[::2] == [1, 0]
    case = make(300, 5, 3, ignored=1.0)
    got = stats_of(case)(*case.leaves())
    assert got.accuracy.isnan()
    assert torch.equal(got.predictions, F.linear(case.x, case.weight, case.bias).argmax(1))


def test_a_chunk_of_not_finite_logits() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.zeros(4, 37)
    logits[0, 20], logits[0, 30] = nan, inf
    logits[1, 36] = inf
    logits[2] = -inf
    logits[3, 17], logits[3, 18] = 2, 2
    want = logits.argmax(1)
    args = (None, None, None, 37.0, -100, 0.0, 0.0, 0.0, True, True)
    for target in (torch.zeros(4, dtype=torch.int64), torch.full((4,), -100)):
        _, lse, got = torch.ops.bigops.linear_cross_entropy_chunk(logits.clone(), target, *args)
        assert torch.equal(got, want)
        if target[0] == 0:
            torch.testing.assert_close(lse[3], logits[3].logsumexp(0))


def test_no_tokens_and_no_classes() -> None:
    got = linear_cross_entropy(
        torch.randn(0, 5), torch.randn(6, 5), torch.zeros(0, dtype=torch.int64), return_stats=True
    )
    assert got.accuracy.isnan()
    assert got.predictions.shape == (0,)
    target = torch.full((3,), -100)
    with pytest.raises(ValueError, match="weight: expected at least one class"):
        linear_cross_entropy(torch.randn(3, 5), torch.empty(0, 5), target, return_stats=True)


def test_the_layer_passes_it_on() -> None:
    layer = LinearCrossEntropy(6, 4, z_loss=0.1)
    x, target = torch.randn(9, 6), torch.randint(0, 4, (9,))
    got = layer(x, target, return_stats=True)
    assert torch.equal(got.loss, layer(x, target))
    assert got.z_loss > 0
    assert torch.equal(got.predictions, layer.logits(x).argmax(1))


@pytest.mark.parametrize("place", ["z_loss", "accuracy", "predictions"])
def test_a_wrong_statistic_is_seen(place: str) -> None:
    case = make(40, 33, 20, z_loss=0.05)
    got = stats_of(case)(*case.leaves())
    wrong = got._replace(**{place: getattr(got, place) * 2 + 1})
    with pytest.raises(AssertionError):
        check(case, wrong)


# class probabilities -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", SOFT.values(), ids=list(SOFT))
def test_probabilities(dtype: torch.dtype, options: dict[str, Any]) -> None:
    make([2, 19], 33, 9, dtype, **options).check()


@pytest.mark.parametrize("lead", [[], [1], [2, 1, 3], [0], [3, 0]], ids=str)
def test_shapes_of_probabilities(lead: list[int]) -> None:
    case = make(lead, 6, 5, probabilities=True)
    if 0 in lead:
        assert case.public()(*case.leaves()).isnan()
    else:
        case.check()
    losses = make(lead, 6, 5, probabilities=True, reduction="none").public()(*case.leaves())
    assert losses.shape == torch.Size(lead)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"target": torch.rand(4, 5)}, r"target: expected shape \[4, 6\]; got \[4, 5\]"),
    ({"target": torch.rand(4)}, r"target: expected shape \[4, 6\]; got \[4\]"),
    ({"ignore_index": 1}, "ignore_index: expected a number below 0 with class probabilities"),
    ({"target": torch.rand(4, 6).requires_grad_()}, "target: expected probabilities that need no"),
]


@pytest.mark.parametrize(("other", "message"), WRONG, ids=[w[1][:30] for w in WRONG])
def test_wrong_probabilities(other: dict[str, Any], message: str) -> None:
    x, weight = torch.randn(4, 5), torch.randn(6, 5)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(x, weight, **{"target": torch.rand(4, 6), **other})
