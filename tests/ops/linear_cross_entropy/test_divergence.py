"""linear_kl_div and linear_js_div against torch's own in float64, along every path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops import backend
from bigops.ops.linear_cross_entropy import chunked, reference
from tests.support import paths
from tests.support.cases.cross_entropy import Checked, Leaves
from tests.support.kernels_ran import needs_extension
from tests.support.tolerance import ACCUMULATION
from tests.support.tolerance import check as check_by_rule

pytestmark = needs_extension
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@dataclass
class Case(Checked):
    """Inputs of one call: the student's x [.., K], weight [V, K], bias; the teacher's."""

    student: Leaves
    teacher: list[Tensor]
    target: Tensor | None
    beta: float  # 0: Kullback-Leibler
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        x = self.student[0]
        assert x is not None
        self.dtype, self.tokens = x.dtype, x.shape[:-1]
        shape = self.tokens if self.options.get("reduction") == "none" else ()
        self.grad = (torch.rand(shape) + 0.5).to(ACCUMULATION[self.dtype])

    def leaves(self) -> Leaves:
        return [None if t is None else t.detach().clone().requires_grad_() for t in self.student]

    def public(self) -> Callable[..., Tensor]:
        options = {**self.options, "target": self.target}
        if self.beta:
            options["beta"] = self.beta

        def f(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            tx, tw, tb = self.teacher
            call = bigops.linear_js_div if self.beta else bigops.linear_kl_div
            return call(x, weight, tx, tw, bias, tb, **options)

        return f

    def kept(self) -> Tensor:
        ignored = self.options.get("ignore_index", -100)
        if self.target is None:
            return torch.ones(self.tokens, dtype=torch.bool).reshape(-1)
        return self.target.reshape(-1) != ignored

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Leaves]:
        """Loss and gradients by torch in ``dtype``, both losses by `F.kl_div`."""
        wide, t = ACCUMULATION[dtype], self.options.get("temperature", 1.0)
        leaves = [
            None if a is None else a.detach().to(dtype).requires_grad_() for a in self.student
        ]

        def log_p(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            z = F.linear(x, weight, bias).to(wide)
            return F.log_softmax(z.reshape(-1, len(weight)) / t, -1)

        p = log_p(*leaves)  # type: ignore[arg-type]
        theirs = (a.to(dtype if dtype == torch.float64 else a.dtype) for a in self.teacher)
        q = log_p(*theirs).to(wide)

        def kl(of: Tensor, to: Tensor) -> Tensor:
            return F.kl_div(to, of, reduction="none", log_target=True).sum(-1)

        if self.beta:
            m = (self.beta * q.exp() + (1 - self.beta) * p.exp()).log()
            losses = self.beta * kl(q, m) + (1 - self.beta) * kl(p, m)
        else:
            losses = kl(q, p)
        losses = losses * self.kept()
        reduction = self.options.get("reduction", "mean")
        loss = losses.view(self.tokens) if reduction == "none" else losses.sum()
        if reduction == "mean":
            loss = loss / self.kept().sum()
        wanted = [a for a in leaves if a is not None]
        found = iter(torch.autograd.grad(loss, wanted, self.grad.to(wide)))
        return loss.detach(), [None if a is None else next(found) for a in leaves]

    def scales(self) -> tuple[Tensor, Leaves]:
        """Error scales of the loss and of the gradients; both logits are stored by the way."""
        t = self.options.get("temperature", 1.0)

        def sums(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            x, weight = x.double().reshape(-1, x.shape[-1]), weight.double()
            bias = torch.zeros(len(weight)).double() if bias is None else bias.double()
            p = F.softmax((x @ weight.t() + bias) / t, -1)
            most = (x.abs() @ weight.abs().t() + bias.abs()).amax(-1, keepdim=True)
            return p, most / t + torch.tensor(len(weight)).log() + 1

        (p, own), (q, theirs) = sums(*self.student), sums(*self.teacher)  # type: ignore[arg-type]
        factor = self.kept().double()
        if self.options.get("reduction", "mean") == "mean":
            factor = factor / factor.sum()
        by_token = (factor * self.grad.double().reshape(-1)).unsqueeze(-1)
        logs = 1 + (own + theirs if self.beta else 0)
        errors = by_token * (p * (1 + 2 * own) + q * (1 + 2 * theirs)) * logs / t
        tokens = 4 * factor * ((own + theirs) ** 2)[:, 0]
        x, weight, bias = self.student
        assert x is not None
        assert weight is not None
        flat = x.double().reshape(-1, x.shape[-1])
        grads: Leaves = [
            (errors @ weight.double().abs()).view(x.shape),
            errors.t() @ flat.abs(),
            None if bias is None else errors.sum(0),
        ]
        reduction = self.options.get("reduction", "mean")
        return tokens.view(self.tokens) if reduction == "none" else tokens.sum(), grads

    def check_loss(self, loss: Tensor, what: str = "") -> None:
        scale, _ = self.scales()
        if self.dtype != loss.dtype:  # 16-bit logits enter a loss that is held in 32 bits
            scale = scale * torch.finfo(self.dtype).eps / torch.finfo(loss.dtype).eps / 16
        plain, truth = self.plain(self.dtype)[0], self.plain(torch.float64)[0]
        check_by_rule(loss, truth, plain, scale, what=f"loss {what}")

    def check_gradients(self, grads: Sequence[Tensor | None], what: str = "") -> None:
        truth, plain = self.plain(torch.float64)[1], self.plain(self.dtype)[1]
        for name, got, ref, base, scale in zip(
            ("x", "weight", "bias"), grads, truth, plain, self.scales()[1], strict=True
        ):
            if ref is None:
                assert got is None
                continue
            assert got is not None
            assert base is not None
            assert scale is not None
            what_of = f"{what} gradient of {name}"
            check_by_rule(got, ref, base, scale, rounding=scale, what=what_of)


def make(
    lead: int | Sequence[int],
    v: int = 33,
    k: int = 9,
    dtype: torch.dtype = torch.float32,
    *,
    beta: float = 0.0,
    bias: bool = True,
    labels: bool = True,
    teacher_dtype: torch.dtype | None = None,
    **options: Any,
) -> Case:
    lead = [lead] if isinstance(lead, int) else list(lead)

    def head(k: int, dtype: torch.dtype) -> list[Tensor]:
        weight = torch.randn(v, k) / max(k, 1) ** 0.5
        return [t.to(dtype) for t in (torch.randn(*lead, k), weight, torch.randn(v))]

    student: Leaves = [*head(k, dtype)]
    if not bias:
        student[2] = None
    target = torch.randint(0, v, lead) if labels else None
    if target is not None:
        target[torch.rand(lead) < 0.2] = options.get("ignore_index", -100)
    return Case(student, head(k + 2, teacher_dtype or dtype), target, beta, options)


ALL: dict[str, dict[str, Any]] = {
    "kl": {},
    "kl, hot": {"temperature": 2.5, "reduction": "sum", "bias": False},
    "kl, none": {"reduction": "none", "labels": False},
    "js": {"beta": 0.5},
    "js, all": {"beta": 0.2, "temperature": 3.0, "reduction": "none", "ignore_index": 1},
}


@pytest.mark.parametrize("options", ALL.values(), ids=list(ALL))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(5, dtype=dtype, **options).check("one chunk")
    monkeypatch.setattr(chunked, "SMALL", 0)
    make([3, 23], dtype=dtype, **options).check("chunks")


@pytest.mark.parametrize("name", ["kl", "js, all"])
@pytest.mark.parametrize("path", ["eager", "compiled", "exported", "after_step"])
def test_paths(path: str, name: str) -> None:
    case = make(5, 7, 3, torch.float64, **ALL[name])
    with backend.record() as names:
        grads = paths.PATHS[path](case.public(), case.leaves(), case.grad)
    assert set(names) == {"reference.linear_cross_entropy"}  # by chunks, in plain torch
    case.check_gradients(grads, path)


@pytest.mark.parametrize("name", ["kl", "js"])
def test_grad_of_vmap(name: str) -> None:
    case = make(5, 7, 3, torch.float64, **{**ALL[name], "labels": False})
    _, tw, tb = case.teacher
    call = bigops.linear_js_div if case.beta else bigops.linear_kl_div

    def total(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        one = lambda x, tx: call(x, weight, tx, tw, bias, tb)  # noqa: E731
        return (torch.vmap(one)(x, case.teacher[0]) * case.grad).mean()

    leaves = [t.detach() for t in case.leaves()]  # type: ignore[union-attr]
    case.check_gradients(torch.func.grad(total, (0, 1, 2))(*leaves), "grad of vmap")


@pytest.mark.parametrize("name", ["kl", "js"])
def test_forward_mode(name: str) -> None:
    case = make(5, 7, 3, torch.float64, **ALL[name])
    leaves = [t.detach() for t in case.leaves()]  # type: ignore[union-attr]
    ahead = torch.randn_like(leaves[0])
    case.grad = torch.ones(())
    _, tangent = torch.func.jvp(lambda x: case.public()(x, *leaves[1:]), (leaves[0],), (ahead,))
    grad = case.plain(torch.float64)[1][0]
    torch.testing.assert_close(tangent, (grad * ahead).sum())  # type: ignore[operator]


def test_autocast_and_a_teacher_of_another_dtype() -> None:
    case = make(9, dtype=torch.bfloat16, teacher_dtype=torch.bfloat16, beta=0.5)
    wide = Case([t.float() for t in case.student], case.teacher, case.target, 0.5)  # type: ignore[union-attr]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case.check_loss(wide.public()(*wide.leaves()))
    make(9, dtype=torch.float32, teacher_dtype=torch.bfloat16, beta=0.5).check()


def test_the_teacher_gets_no_gradient() -> None:
    case = make(5)
    case.teacher = [t.requires_grad_() for t in case.teacher]
    leaves = case.leaves()
    case.public()(*leaves).backward()
    assert all(t.grad is None for t in case.teacher)
    assert leaves[1].grad is not None  # type: ignore[union-attr]


def test_double_backward_raises() -> None:
    case = make(5, 7, 3, torch.float64, beta=0.5)
    x, weight, bias = case.leaves()
    (gx,) = torch.autograd.grad(case.public()(x, weight, bias), x, create_graph=True)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        gx.square().sum().backward()


def test_no_tokens_and_meta() -> None:
    case = make([3, 0])
    assert case.public()(*case.leaves()).isnan()
    assert make([0], reduction="none").public()(*make([0]).leaves()).shape == (0,)
    x, weight, bias = (t.to("meta").requires_grad_() for t in case.student)  # type: ignore[union-attr]
    teacher = [t.to("meta") for t in case.teacher]
    loss = bigops.linear_kl_div(x, weight, teacher[0], teacher[1], bias, teacher[2])
    assert torch.autograd.grad(loss, x)[0].shape == x.shape


def test_equal_heads_do_not_diverge() -> None:
    case = make(9, beta=0.5)
    x, weight, bias = case.student
    assert x is not None
    for call in (bigops.linear_kl_div, bigops.linear_js_div):
        assert call(x, weight, x, weight, bias, bias).abs() < 1e-6  # type: ignore[arg-type]


def test_opcheck() -> None:
    case = make(4, 6, 5)
    x, weight, bias = case.leaves()
    target = torch.zeros(4, dtype=torch.int64)
    args = (x, weight, target, bias, None, *case.teacher, "mean", -100, 0.0, 0.0, 0.0, 2.0, 0.5)
    paths.opcheck(torch.ops.bigops.linear_cross_entropy, args)
    paths.opcheck(torch.ops.bigops.linear_cross_entropy_with_grad, (*args, True, True, True, False))


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    true_run = chunked.run

    def off(*args: Any) -> Any:
        losses, grads = true_run(*args)
        return losses * 1.001, tuple(None if g is None else g * 1.01 for g in grads)

    monkeypatch.setattr(chunked, "run", off)
    for options in ALL.values():
        case = make(5, 7, 3, torch.float64, **options)
        leaves = case.leaves()
        loss = case.public()(*leaves)
        wanted = [t for t in leaves if t is not None]
        grads = iter(torch.autograd.grad(loss, wanted, case.grad))
        with pytest.raises(AssertionError, match="loss"):
            case.check_loss(loss)
        with pytest.raises(AssertionError, match="gradient of"):
            case.check_gradients([None if t is None else next(grads) for t in leaves])


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"teacher_x": torch.randn(3, 4)}, ValueError, r"teacher_x: expected shape \[4, '..'\]"),
    ({"teacher_x": torch.randn(4, 3)}, ValueError, r"teacher_x: expected shape \[.., 4\]"),
    ({"teacher_weight": torch.randn(5, 4)}, ValueError, "teacher_weight: expected 6 classes"),
    ({"teacher_weight": None}, TypeError, "teacher_weight: expected a torch.Tensor; got None"),
    ({"teacher_weight": torch.randn(6, 4).double()}, TypeError, "teacher_weight: expected dtype"),
    ({"teacher_bias": torch.randn(5)}, ValueError, r"teacher_bias: expected shape \[6\]"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a positive finite number; got 0"),
    ({"reduction": "batchmean"}, ValueError, "reduction: expected one of mean, sum, none"),
    ({"target": torch.zeros(3).long()}, ValueError, r"target: expected shape \[4\]; got \[3\]"),
]


@pytest.mark.parametrize(("other", "kind", "message"), WRONG, ids=[w[2][:30] for w in WRONG])
def test_wrong_arguments(other: dict[str, Any], kind: type[Exception], message: str) -> None:
    base = {"teacher_x": torch.randn(4, 4), "teacher_weight": torch.randn(6, 4)}
    with pytest.raises(kind, match=message):
        bigops.linear_kl_div(torch.randn(4, 5), torch.randn(6, 5), **{**base, **other})
    with pytest.raises(ValueError, match="beta: expected a number between 0 and 1; got 1"):
        bigops.linear_js_div(torch.randn(4, 5), torch.randn(6, 5), **base, beta=1.0)


def test_the_reference_takes_probabilities() -> None:
    x, weight, q = torch.randn(4, 5), torch.randn(6, 5), torch.rand(4, 6)
    want = F.cross_entropy(F.linear(x, weight), q)
    torch.testing.assert_close(reference(x, weight, q), want)
