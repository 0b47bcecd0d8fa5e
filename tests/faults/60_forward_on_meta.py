"""A call on the meta device gives the shape and the dtype, as torch's layers do (dry runs, sizing a model).

A user builds a model under torch.device("meta") and calls it to learn its shapes, as nn.Linear allows.
"""

import sys

import torch
from torch import nn

import bigops

x, w = torch.empty(3, 64, device="meta"), torch.empty(32, 64, device="meta")
dense = torch.randn(32, 64)
u, v = torch.empty(32, 4, device="meta"), torch.empty(4, 64, device="meta")


def on_meta(weight):
    return weight.map(lambda t: t.to("meta"))


def layer(config):
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    bigops.compress_(model, config)
    return model.to("meta")


CALLS = {
    "F.linear (control)": lambda: nn.functional.linear(x, w),
    "fused_linear": lambda: bigops.fused_linear(x, w, activation="gelu"),
    "low_rank_linear": lambda: bigops.low_rank_linear(x, u, v),
    "packed_linear": lambda: bigops.packed_linear(
        x, on_meta(bigops.formats.PackedWeight.from_dense(dense))
    ),
    "quantized_linear": lambda: bigops.quantized_linear(
        x, on_meta(bigops.formats.QuantizedWeight.from_dense(dense))
    ),
    "fp8_linear": lambda: bigops.fp8_linear(x, on_meta(bigops.formats.Fp8Weight.from_dense(dense))),
    "nn.Linear of bigops": lambda: bigops.nn.Linear(64, 32, device="meta")(x),
    "GatedMLP": lambda: bigops.nn.GatedMLP(64, 16, 32, device="meta")(x),
    "compress_, Int8": lambda: layer(bigops.Int8())(x),
    "compress_, Sparse": lambda: layer(bigops.Sparse(0.5))(x),
}
wrong = []
for name, call in CALLS.items():
    try:
        y = call()
    except RuntimeError as error:
        wrong.append(f"{name}: {str(error)[:60]}")
        continue
    if y.shape != (3, 32) or y.device.type != "meta":
        wrong.append(f"{name}: {list(y.shape)} on {y.device}")
print("; ".join(wrong) or "ok")
sys.exit(bool(wrong))
