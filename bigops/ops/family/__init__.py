"""What all linear ops share: schema, reference, fake, autograd, vmap, autocast, dispatch.

An op of the family is ``y = act(x W^T + bias) + residual`` with W in one format, a dense matrix
(`fused_linear`) and two factors (`low_rank_linear`) among them. In the library it takes ``(x,
*arguments of the format, bias, residual, activation)``; its backward op takes ``(grad, x,
*arguments, bias, activation, need_x, need_ of each tensor that is trained, need_bias)`` and gives
the gradients that are needed. Where the format names what a forward keeps for them (`Format.KEPT`),
the op ``<name>_with_parts`` gives that besides y, and the backward op takes it in place of the
bias. Inside Python a call is one object (`Call`); it is flattened once, at the schema. Where the
forward rounds its activations, the gradient is the straight-through one: that of the dequantised
weight, taken at the pre-activation which the forward saw (Bengio et al. 2013, arXiv 1308.3432).
"""

from bigops.ops.family.call import Call
from bigops.ops.family.linear_op import LinearOp, linear_ops, op_of
from bigops.ops.family.rows_op import RowsCall, RowsOp
from bigops.ops.family.u8_op import U8Call, U8Op

__all__ = ["Call", "LinearOp", "RowsCall", "RowsOp", "U8Call", "U8Op", "linear_ops", "op_of"]
