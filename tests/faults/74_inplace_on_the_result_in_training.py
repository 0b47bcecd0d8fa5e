"""What follows a swapped layer may write in place, in training too, as it may behind nn.Linear.

`x = self.proj(x); x += self.position` is a usual way to write a patch embedding. At sizes where
torch's own kernel serves the call, the result of the custom autograd Function is a view, and
autograd refuses: "Output 0 of _FusedLinear is a view and is being modified inplace".
"""

import copy
import sys

import torch
from torch import nn

import bigops


class Embed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, width)
        self.position = nn.Parameter(torch.randn(width))

    def forward(self, x):
        y = self.proj(x)
        y += self.position
        return y


torch.manual_seed(0)
torch.set_num_threads(1)
wrong = []
for width in (64, 256, 768, 1024):
    for shape in ((7,), (2, 49), (4, 196), (2, 7, 7)):
        stock = nn.Sequential(Embed(width))
        x = torch.randn(*shape, width)
        for name, swap in (
            ("fuse_", lambda m: bigops.fuse_(m)),
            ("recovery", lambda m: bigops.compress_(m, bigops.Int8(), freeze=False)),
            ("LowRank", lambda m: bigops.compress_(m, bigops.LowRank(16))),
            ("LoRA", lambda m: bigops.add_lora_(m, rank=4)),
        ):
            model = copy.deepcopy(stock)
            swap(model)
            try:
                model.train()(x).square().mean().backward()
            except RuntimeError as error:
                wrong.append(f"{name} at {[*shape, width]}: {str(error)[:72]}")
if wrong:
    print(f"{len(wrong)} of 64 raise; {'; '.join(wrong[:3])}")
    sys.exit(1)
print("ok")
