"""Seeded fuzzing of every op on every instruction set: values and gradients by the numerics rule.

A case that fails is named by its instruction set and number; `run(level, number)` repeats it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops import backend
from bigops.ops.fused_linear import fused_linear
from bigops.ops.low_rank_linear import low_rank_linear
from tests.accept.conftest import Accept
from tests.support.cases import compressed as compressed_cases
from tests.support.cases import cross_entropy as cross_entropy_cases
from tests.support.cases import linear as linear_cases
from tests.support.cases import low_rank as low_rank_cases
from tests.support.cases.compressed import PATTERNS, QUANTISED, SPARSE, served
from tests.support.cases.linear import ACTIVATIONS, PLAIN
from tests.support.kernels_ran import ISAS, isa, needs_extension, threads

pytestmark = [needs_extension, pytest.mark.slow]

CASES = 10_000  # for each instruction set
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def lead_of(random: Random) -> list[int]:
    """Leading sizes of x: few rows or many, none, a vector, up to five dimensions."""
    kind = random.randrange(8)
    if kind == 0:
        return [random.choice([0, 1, 2, 3]) for _ in range(random.randrange(4))]
    if kind == 1:
        return [random.choice([64, 129, 257])]
    return [random.randint(1, 24)]


def width_of(random: Random) -> int:
    """A width: around those of vectors, small, at times none or longer than a block of sums."""
    kind = random.randrange(16)
    if kind == 0:
        return random.choice([0, 1, 1030, 2049, 4100])
    if kind < 8:
        return max(1, 16 * random.randint(1, 12) + random.choice([-1, 0, 0, 1]))
    return random.randint(1, 150)


def laid_out(t: Tensor, random: Random) -> Tensor:
    """The same numbers, at times by other strides."""
    kind = random.randrange(6)
    if kind == 0 and t.dim() >= 2:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == 1 and t.dim() >= 1 and t.numel():
        return t.repeat_interleave(2, -1)[..., ::2]
    if kind == 2 and t.dim() >= 1:
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)  # unaligned
    return t


def called(f: Callable[..., Tensor], case: Any, random: Random) -> None:
    """Forward and, of a third, the gradients; inputs by strides of any kind.

    Not those of relu: where z is 0 but for rounding, either slope is right.
    """
    leaves = [None if t is None else laid_out(t, random) for t in case.leaves()]
    if random.randrange(3) or case.name in ("relu", "reglu"):
        with torch.no_grad():
            y = f(*leaves)
        case.check_forward(y)
        return
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    y = f(*leaves)
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, wanted, case.grad))
    case.check_forward(y)
    case.check_gradients([None if t is None else next(found) for t in leaves])


def dense(random: Random) -> str:
    dtype = random.choice([*FLOATS, torch.float64])
    shape = lead_of(random), width_of(random), width_of(random)
    name = random.choice(ACTIVATIONS)
    given = {"bias": random.random() < 0.7, "residual": random.random() < 0.5}
    case = linear_cases.make(*shape, dtype, name, **given)
    called(lambda *args: fused_linear(*args, name), case, random)
    return "fused_linear"


def compressed(random: Random) -> str:
    form = random.choice([*QUANTISED, *SPARSE, *SPARSE, "packed", "packed"])
    shape = lead_of(random), width_of(random), width_of(random)
    case = compressed_cases.make(
        form,
        *shape,
        random.choice(served(form)),
        random.choice(PLAIN),
        bias=random.random() < 0.7,
        residual=random.random() < 0.5,
        sparsity=random.choice([0.0, 0.5, 0.8, 0.95, 1.0]),
        pattern=random.choice(PATTERNS),
        values=form in SPARSE and form != "sparse_int8" and random.random() < 0.5,
    )
    called(case.public, case, random)
    return case.op


def low_rank(random: Random) -> str:
    n, k = width_of(random), width_of(random)
    rank = random.randint(0, min(n, k, 40))
    name, scale = random.choice(PLAIN), random.choice([1.0, 0.25])
    case = low_rank_cases.make(
        lead_of(random) or [1],
        n,
        k,
        rank,
        random.choice(FLOATS),
        name,
        base=random.random() < 0.5,
        extras=random.random() < 0.5,
        scale=scale,
    )

    def f(x: Tensor, u: Tensor, v: Tensor, *rest: Tensor | None) -> Tensor:
        bias, residual, base = rest
        return low_rank_linear(x, u, v, bias, residual, name, base=base, scale=scale)

    called(f, case, random)
    return "low_rank_linear"


def loss(random: Random) -> str:
    options: dict[str, Any] = {"reduction": random.choice(["mean", "sum", "none"])}
    if random.random() < 0.5:
        options |= {"label_smoothing": 0.1, "z_loss": random.choice([0.0, 1e-3])}
    tokens = random.randint(1, 40)
    ignored = 0.3 if tokens > 15 else 0.0  # of no token at all the mean is NaN
    cross_entropy_cases.make(
        tokens,
        random.randint(1, 300),
        random.randint(1, 70),
        random.choice(FLOATS),
        ignored=ignored,
        bias=random.random() < 0.5,
        **options,
    ).check()
    return "linear_cross_entropy"


def run(level: str, number: int) -> tuple[str, list[str]]:
    """One case: the op, and the kernels that ran."""
    random = Random(f"{level} {number}")
    torch.manual_seed(random.getrandbits(32))
    kind = random.choice([dense, dense, compressed, compressed, compressed, low_rank, loss])
    with isa(level), threads(random.choice([1, 2])), backend.record() as names:
        op = kind(random)
    return op, names


@pytest.mark.parametrize("level", ISAS)
def test_no_number_is_wrong(level: str, accept: Accept) -> None:
    wrong: list[str] = []
    ran: Counter[str] = Counter()
    references: Counter[str] = Counter()
    for number in range(accept.count(CASES)):
        try:
            op, names = run(level, number)
        except Exception as error:
            wrong.append(f"run({level!r}, {number}): {type(error).__name__}: {error}")
            continue
        ran[op] += 1
        references.update(name for name in names if name.startswith("reference."))
    accept.result(cases=sum(ran.values()) + len(wrong), wrong=len(wrong), ops=dict(ran))
    assert not wrong, "\n".join(itertools.islice(wrong, 10))
    assert not references, references
    assert len(ran) == 6, ran


def test_a_wrong_number_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: one element off by 0.1 %."""
    right = fused_linear

    def off(*args: Any) -> Tensor:
        y = right(*args).clone()
        y.view(-1)[:1] *= 1.001
        return y

    monkeypatch.setitem(globals(), "fused_linear", off)
    caught = 0
    for number in range(60):
        try:
            run(ISAS[-1], number)
        except AssertionError:
            caught += 1
    assert caught >= 5
