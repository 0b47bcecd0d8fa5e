"""A layer that forward calls through a plain list is swapped where it is called, or left.

Only the registered place is exchanged: the model goes on calling the old layer, so nothing is
compressed (nor adapted) and the old weight stays in memory, while the record counts its bytes as
saved.
"""

import gc
import sys

import torch
from torch import nn

import bigops


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.steps = [self.first, torch.tanh, self.last]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step(x)
        return x


torch.manual_seed(0)
wrong = []
model, x = Steps().eval(), torch.randn(4, 64)
with torch.no_grad():
    want = model(x)
    record = bigops.compress_(model, bigops.Int8())
    same = torch.equal(model(x), want)
gc.collect()
dense = sum(type(o) is nn.Parameter and o.shape == (64, 64) for o in gc.get_objects())
if record.done and same and dense:
    said = f"{len(record.done)} said to be int8"
    wrong.append(
        f"compress_: {said}, the result is dense to the bit, {dense} dense weights in memory"
    )
model = Steps()
try:
    record = bigops.add_lora_(model, rank=2)
except ValueError:
    record = None
if record and record.done and not model(x).requires_grad:
    wrong.append(f"add_lora_: {len(record.done)} said to be adapted, nothing is trained by forward")
if wrong:
    print("; ".join(wrong))
sys.exit(bool(wrong))
