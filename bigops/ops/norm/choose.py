"""Which kernel serves a norm, for dispatch and for `bigops.explain`.

The CPU kernels register themselves (csrc/cpu/norm.cpp); other devices take the reference: what
Inductor makes of it there is one kernel that reads x once, too.
"""

from __future__ import annotations

import functools

from torch import Tensor

from bigops.formats import checks
from bigops.ops import targets
from bigops.ops.choice import Choice, on_cpu, reference
from bigops.ops.explain import serves
from bigops.ops.norm.schema import ACT_QUANT, NORM, WITH_SUM, Call, Form
from bigops.ops.targets import Target


def choose(form: Form, call: Call, target: Target) -> Choice:
    """The kernel that serves a call on ``target``."""
    if not targets.is_cpu(target):
        targets.present(target)  # it refuses what is no device
        return reference(form.name, "no GPU kernel of this op: torch.compile fuses a norm there")
    x = checks.short(call.x.dtype)
    reason = "one pass over memory, rows in L1"
    return on_cpu(
        form.name, lambda extension: (extension.choose_norm(form.name, x, call.kind), reason)
    )


def _explain(
    form: Form,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    kind: str = "layer",
    device: str | None = None,
    **flags: bool,
) -> Choice:
    given = {**dict.fromkeys(form.flags, False), **flags}
    if len(given) > len(form.flags):
        unknown = ", ".join(sorted(given.keys() - set(form.flags)))
        raise TypeError(f"{unknown}: no argument of {form.name}")
    Call(x, weight, bias, residual, eps, kind).check_tensors()
    call, _ = form.check(x, weight, bias, residual, eps, kind, *given.values())
    return choose(form, call, targets.named(device, x))


for _form in (NORM, WITH_SUM, ACT_QUANT):
    serves(_form.name)(functools.partial(_explain, _form))
