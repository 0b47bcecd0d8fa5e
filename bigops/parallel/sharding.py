"""How the ops split over a device mesh: sharding rules for DTensor.

Call ``register_sharding_rules()`` once, before the ops see a DTensor; importing
torch.distributed.tensor takes long, so nothing here happens by itself. With the rules, the layers
work under ``distribute_tensor`` and torch's tensor parallel plans (ColwiseParallel and
RowwiseParallel), gradients included.

Each rule is one way in which every rank can run the op on its own part and get its own part of
the result; DTensor picks the one that moves the fewest bytes. W is [N, K] here:

========================  ==================  ================  ==========================
split along               x [.., K]           W                 y [.., N]
========================  ==================  ================  ==========================
rows of x                 split               whole             split
N, not for gated pairs    whole               rows split        last dimension split
K, only without an        last dim. split     columns split     a sum over ranks is open
activation, dense only
========================  ==================  ================  ==========================

A gated weight [2N, K] has a gate row and an up row for each column of y, half the weight apart:
its first half of rows is no half of the op. The rows of a quantised weight split by whole tiles of
16, as many for each rank; a dynamically quantised row of x needs all of K for its range. The
storage of ``sparse_linear`` has no sub-tensor that belongs to some rows alone; where its values are
trained, their gradient is an open sum over the ranks' rows of x.

The weight of ``fp8_linear`` splits by N likewise, with scales in blocks by whole blocks of 128.

The factors u [N, r] and v [r, K] of ``low_rank_linear`` split by rows of x, by N (rows of u and of
the base; every rank then makes x v^T) and, without an activation and a base, by r (columns of u,
rows of v; a sum over ranks is open). By N each rank needs r rows of u, since a rank above the
smaller side is refused. K is not split: v would be, at once with r.

``linear_cross_entropy`` splits by tokens with reduction "none" (the losses are split) and "sum" (a
sum over ranks is open), gradients of weight and bias being open sums; the weight is whole. "mean"
is not split, since each rank would divide by its own tokens, nor are the classes, whose softmax
needs all of them, nor K.

``norm``, ``norm_with_sum`` and ``norm_act_quant`` split by rows; a row is whole.
"""

from __future__ import annotations

import torch

from bigops.ops import sharding
from bigops.ops.family import linear_ops
from bigops.ops.library import in_words
from bigops.ops.linear_cross_entropy import sharding as loss_rules
from bigops.ops.norm.sharding import rules_of as norm_rules

_LOSSES = [name for name in vars(loss_rules) if name.startswith("linear_cross_entropy")]
_registered = False


def register_sharding_rules() -> None:
    """Tell DTensor how the ops of bigops split. Further calls do nothing.

    Raises:
        RuntimeError: torch was built without torch.distributed.
    """
    global _registered
    if _registered:
        return
    if not torch.distributed.is_available():
        raise RuntimeError("register_sharding_rules: this torch was built without distributed")
    from torch.distributed.tensor.experimental import register_sharding

    def register(op: torch._ops.OpOverload, rules: sharding.Rules) -> None:
        register_sharding(op)(in_words(op, rules))

    for name in _LOSSES:
        register(getattr(torch.ops.bigops, name).code, getattr(loss_rules, name))
    for form, rules in norm_rules():
        register(form.op, rules)
    for op in linear_ops():
        register(op.forward, sharding.of_linear_op(op))
        if op.kept:
            register(op.forward_kept, sharding.of_linear_op(op, op.kept))
        register(op.gradients.backward, sharding.of_backward(op))
        if op.u8 is not None:
            register(op.u8.forward, sharding.of_u8_op(op.u8))
    _registered = True
