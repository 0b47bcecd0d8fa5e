"""A model that torch.fx traces can still be traced after fuse_ and compress_, with equal numbers.

torch.fx takes the layers of torch.nn as leaves and enters all others: a bigops layer is given a
Proxy, as any tensor-like object that has `__torch_function__`. torchvision's and timm's feature
extractors, the folding of BatchNorm into convolutions (torch.fx.experimental.optimization.fuse) and
FX quantisation all start with such a trace.
"""

import copy
import sys

import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

import bigops

torch.manual_seed(0)
body = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
stock = nn.Sequential(*body, nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 64)).eval()
x = torch.randn(2, 3, 32, 32)
wrong = []
for name, swap in (
    ("fuse_", lambda m: bigops.fuse_(m)),
    ("Int8", lambda m: bigops.compress_(m, bigops.Int8())),
    ("Int4", lambda m: bigops.compress_(m, bigops.Int4())),
    ("Fp8", lambda m: bigops.compress_(m, bigops.Fp8())),
    ("Sparse", lambda m: bigops.compress_(m, bigops.Sparse(0.5))),
    ("Sparse + Int8", lambda m: bigops.compress_(m, bigops.Sparse(0.5) + bigops.Int8())),
    ("LowRank", lambda m: bigops.compress_(m, bigops.LowRank(16))),
    ("LowRank + Int8", lambda m: bigops.compress_(m, bigops.LowRank(16) + bigops.Int8())),
    ("LoRA", lambda m: bigops.add_lora_(m, rank=4)),
):
    model = copy.deepcopy(stock)
    swap(model)
    model.eval()
    with torch.no_grad():
        want = model(x)
        for tool, make in (("symbolic_trace", fx.symbolic_trace), ("fuse of conv and norm", fuse)):
            try:
                off = float((make(copy.deepcopy(model))(x) - want).abs().max() / want.abs().max())
            except Exception as error:
                wrong.append(
                    f"{name}, {tool}: {type(error).__name__}: {str(error).splitlines()[0]}"
                )
            else:
                if not off < 1e-2:
                    wrong.append(f"{name}, {tool}: off by {off:.2g}")
print("; ".join(wrong) or "ok")
sys.exit(bool(wrong))
