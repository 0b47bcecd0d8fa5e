"""A host that looks among its own modules for an nn.Linear, to learn a dtype, still finds one.

Attention code asks ``next(m for m in self.modules() if isinstance(m, nn.Linear)).weight.dtype``
before it calls a kernel for half precision, and heads are resized by type. After compress_ or
add_lora_ on all of a block's layers none is there: StopIteration, without a word of bigops.
"""

import sys

import torch
from torch import nn

import bigops


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        dtype = next(m for m in self.modules() if isinstance(m, nn.Linear)).weight.dtype
        y = nn.functional.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype))
        return self.o(y.to(x.dtype))


wrong = []
x = torch.randn(2, 5, 32)
for name, verb in (
    ("fuse_", bigops.fuse_),
    ("compress_", lambda m: bigops.compress_(m, bigops.Int8())),
    ("compress_ low rank", lambda m: bigops.compress_(m, bigops.LowRank(4))),
    ("add_lora_", lambda m: bigops.add_lora_(m, rank=2)),
):
    model = nn.Sequential(Attention()).eval()
    verb(model)
    try:
        with torch.no_grad():
            model(x)
    except (StopIteration, AttributeError) as error:
        wrong.append(f"{name}: {type(error).__name__} {error}".strip())
if wrong:
    print("; ".join(wrong))
sys.exit(bool(wrong))
