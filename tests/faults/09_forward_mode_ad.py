"""Forward-mode AD must give the tangent or raise, never drop it.

Sources: pytorch/pytorch#187284, pytorch/functorch#207.
"""

import sys

import torch
import torch.autograd.forward_ad as fwd

import bigops

torch.manual_seed(0)
x, t, w = torch.randn(4, 8), torch.randn(4, 8), torch.randn(6, 8)
target = torch.arange(4)
OPS = {
    "fused_linear": lambda v: bigops.fused_linear(v, w, activation="gelu"),
    "low_rank_linear": lambda v: bigops.low_rank_linear(v, w[:, :2].contiguous(), w[:2]),
    "linear_cross_entropy": lambda v: bigops.linear_cross_entropy(v, w, target),
    "packed_linear": lambda v: bigops.packed_linear(v, bigops.formats.PackedWeight.from_dense(w)),
    "quantized_linear": lambda v: bigops.quantized_linear(
        v, bigops.formats.QuantizedWeight.from_dense(w, activations="none")
    ),
    "fp8_linear": lambda v: bigops.fp8_linear(
        v, bigops.formats.Fp8Weight.from_dense(w, activations="none")
    ),
}
wrong = []
for name, op in OPS.items():
    try:
        with fwd.dual_level():
            tangent = fwd.unpack_dual(op(fwd.make_dual(x, t))).tangent
    except (NotImplementedError, RuntimeError):
        continue  # an error is honest
    if tangent is None:
        wrong.append(f"{name}: the tangent is dropped")
try:
    jacobian = torch.autograd.functional.jacobian(
        OPS["fused_linear"], x, strategy="forward-mode", vectorize=True
    )
    if not jacobian.any():
        wrong.append("functional.jacobian(strategy='forward-mode') of fused_linear is all zero")
except (NotImplementedError, RuntimeError):
    pass
print("\n".join(wrong) or "ok")
sys.exit(bool(wrong))
