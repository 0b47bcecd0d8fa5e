"""Cases of low_rank_linear and linear_cross_entropy for sharding_worker.py and its test.

Layouts as there: "R" replicated, "P" an open sum, a digit for Shard of that dimension, "-" leaves
the argument out. A result of "?" may lie as it likes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigops.ops.linear_cross_entropy import linear_cross_entropy
from bigops.ops.low_rank_linear import low_rank_linear
from tests.support.cases import low_rank as low_rank_cases

CLASSES = 11


class Factors(NamedTuple):
    """low_rank_linear with x [.., K], u [N, 2], v [2, K]."""

    activation: str
    x: tuple[int, ...]
    n: int
    layout: str  # of x, u, v, bias, residual, base
    y: str
    silent: bool = True
    trains: bool = True
    raw: bool = False
    twice: bool = False


class Loss(NamedTuple):
    """linear_cross_entropy with x [.., K] and CLASSES classes."""

    reduction: str
    x: tuple[int, ...]
    layout: str  # of x, weight, target, bias, class_weight
    y: str
    options: dict[str, Any] | None = None
    silent: bool = True
    fixed: tuple[str, ...] = ()  # leaves that need no gradient
    raw: bool = False  # by torch.ops, whose autograd is registered with the dispatcher
    twice: bool = False  # the gradients of a second backward pass


FACTORS = {
    "rows": Factors("gelu", (6, 16), 8, "0RRR0-", "0"),
    "inner_rows": Factors("none", (3, 4, 16), 8, "1RRR--", "1"),
    "uneven_rows_with_base": Factors("silu", (5, 16), 8, "0RRRRR", "0"),
    "inference_rows": Factors("gelu", (6, 16), 8, "0RRR0-", "0", trains=False),
    "raw_rows": Factors("gelu", (6, 16), 8, "0RRR0R", "0", raw=True),
    "columns": Factors("gelu", (6, 16), 8, "R0R01-", "1"),
    "columns_with_base": Factors("none", (3, 4, 16), 8, "R0R0-0", "2"),
    "rank": Factors("none", (6, 16), 8, "R10RR-", "P"),
    "rank_bare": Factors("none", (3, 4, 16), 8, "R10---", "P"),
    # no rule: an activation of a sum, and too few rows of u for the rank on each of two ranks
    "rank_gelu": Factors("gelu", (6, 16), 8, "R10R--", "?", silent=False),
    "few_columns": Factors("gelu", (6, 16), 2, "R0R0--", "R", silent=False),
    "inner": Factors("none", (6, 16), 8, "1R1R--", "?", silent=False),
}
LOSSES = {
    "tokens": Loss("sum", (6, 8), "0R0R-", "P", {"label_smoothing": 0.1, "z_loss": 0.01}),
    "inner_tokens": Loss("sum", (2, 6, 8), "1R1-R", "P"),
    "uneven_tokens": Loss("sum", (5, 8), "0R0--", "P", {"softcap": 5.0}),
    "one_by_one": Loss("none", (6, 8), "0R0RR", "0"),
    "inner_one_by_one": Loss("none", (2, 6, 8), "1R1R-", "1", {"softcap": 5.0}),
    "frozen_weight": Loss("sum", (6, 8), "0R0R-", "P", fixed=("weight", "bias")),
    "frozen_hidden": Loss("none", (6, 8), "0R0R-", "0", fixed=("x",)),
    "inference": Loss("sum", (6, 8), "0R0R-", "P", fixed=("x", "weight", "bias")),
    "twice": Loss("sum", (6, 8), "0R0RR", "P", twice=True),
    "raw_tokens": Loss("none", (6, 8), "0R0R-", "0", raw=True),
    # no rule: a mean of means, classes apart
    "mean": Loss("mean", (6, 8), "0R0R-", "?", silent=False),
    "classes": Loss("sum", (6, 8), "R0R0-", "?", silent=False),
}
NAMES = {"factors": low_rank_cases.NAMES, "loss": ("x", "weight", "target", "bias", "class_weight")}


def tensors(kind: str, name: str) -> dict[str, Tensor | None]:
    """The whole arguments of a case and "grad", the same on every rank and in the test, float32."""
    torch.manual_seed(list({**FACTORS, **LOSSES}).index(name))
    if kind == "factors":
        case = FACTORS[name]
        made = low_rank_cases.make(case.x[:-1], case.n, case.x[-1], 2, base=True)
        whole: dict[str, Tensor | None] = dict(zip(NAMES[kind], made.inputs, strict=True))
        layout, grad = case.layout, made.grad
    else:
        loss = LOSSES[name]
        target = torch.randint(CLASSES, loss.x[:-1])
        target.view(-1)[1] = -100
        whole = {
            "x": torch.randn(loss.x),
            "weight": torch.randn(CLASSES, loss.x[-1]) / loss.x[-1] ** 0.5,
            "target": target,
            "bias": torch.randn(CLASSES),
            "class_weight": torch.rand(CLASSES) + 0.5,
        }
        layout = loss.layout
        grad = torch.rand(loss.x[:-1] if loss.reduction == "none" else ()) + 0.5
    kept = zip(whole.items(), layout, strict=True)
    return {**{k: None if where == "-" else t for (k, t), where in kept}, "grad": grad}


def call(kind: str, name: str, given: dict[str, Any]) -> Tensor:
    """The public function on the case's arguments."""
    ops = torch.ops.bigops
    if kind == "factors":
        x, u, v, bias, residual, base = (given[k] for k in NAMES[kind])
        activation = FACTORS[name].activation
        if FACTORS[name].raw:
            return ops.low_rank_linear(x, u, v, base, 1.0, bias, residual, activation)  # type: ignore[no-any-return]
        return low_rank_linear(x, u, v, bias, residual, activation, base=base)
    case = LOSSES[name]
    x, weight, target, bias, class_weight = (given[k] for k in NAMES[kind])
    if case.raw:
        options = (None, None, None, case.reduction, -100, 0.0, 0.0, 0.0, 1.0, 0.0)
        return ops.linear_cross_entropy(x, weight, target, bias, class_weight, *options)  # type: ignore[no-any-return]
    chosen = {"reduction": case.reduction, "class_weight": class_weight, **(case.options or {})}
    return linear_cross_entropy(x, weight, target, bias, **chosen)


def trained(kind: str, name: str) -> tuple[str, ...]:
    """Arguments whose gradients are wanted."""
    if kind == "factors":
        return NAMES[kind] if FACTORS[name].trains else ()
    return tuple(k for k in ("x", "weight", "bias") if k not in LOSSES[name].fixed)


def run_case(kind: str, name: str, mesh: Any) -> dict[str, Tensor]:
    """What this rank and the others make of a case: the result and gradients, gathered."""
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    def placement(letter: str) -> Any:
        if letter in "RP":
            return [Replicate() if letter == "R" else Partial()]
        return [Shard(int(letter))]

    case: Any = FACTORS[name] if kind == "factors" else LOSSES[name]
    whole, wanted = tensors(kind, name), trained(kind, name)
    given: dict[str, Any] = {}
    for key, letter in zip(NAMES[kind], case.layout, strict=True):
        value = whole[key]
        if value is not None:
            value = distribute_tensor(value, mesh, placement(letter)).requires_grad_(key in wanted)
        given[key] = value
    with CommDebugMode() as talk:
        y = call(kind, name, given)
    if case.silent:
        assert talk.get_total_counts() == 0, f"{name}: {talk.get_comm_counts()}"
    if case.y != "?":
        assert list(y.placements) == placement(case.y), f"{name}: y lies as {y.placements}"
    seen = {"y": y.full_tensor().detach()}
    leaves = {key: t for key, t in given.items() if t is not None and t.requires_grad}
    if leaves:
        loss = (y * distribute_tensor(whole["grad"], mesh, [Replicate()])).sum()
        loss.backward(retain_graph=case.twice)
        if case.twice:
            for leaf in leaves.values():
                leaf.grad = None
            loss.backward()
    return seen | {f"grad_{key}": leaf.grad.full_tensor() for key, leaf in leaves.items()}


def run_all(mesh: Any) -> dict[str, dict[str, Tensor]]:
    """Every case by kind and name."""
    kinds = (("factors", FACTORS), ("loss", LOSSES))
    return {f"{kind}.{name}": run_case(kind, name, mesh) for kind, names in kinds for name in names}  # type: ignore[attr-defined]
