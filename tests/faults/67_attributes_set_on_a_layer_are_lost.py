"""What was set on a layer (a flag, a scale, a buffer) is there after a swap, or the layer is left.

Frameworks mark layers: initialisers skip those that are flagged as loaded, forward passes read a
gain, optimiser builders read a learning rate. The new layer takes over weight, bias and mode only,
and nothing says so: a loaded model whose layers lost the flag is initialised anew.
"""

import sys

import torch
from torch import nn

import bigops


class Gained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)
        self.proj.gain = 3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) * getattr(self.proj, "gain", 1.0)


def initialise(model: nn.Module) -> None:
    """What a composed model does with its parts: layers that hold loaded weights are skipped."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not getattr(module, "is_loaded", False):
            nn.init.normal_(module.weight, std=0.02)


wrong = []
x = torch.randn(4, 16)
for name, verb in (
    ("fuse_", bigops.fuse_),
    ("compress_", lambda m: bigops.compress_(m, bigops.Int8())),
    ("add_lora_", lambda m: bigops.add_lora_(m, rank=2)),
):
    torch.manual_seed(0)
    model = Gained().eval()
    with torch.no_grad():
        want = model(x)
        record = verb(model)
        off = float((model(x) - want).abs().max() / want.abs().max())
    if off > 0.1 and record.reason("proj") is None:
        wrong.append(f"{name}: forward reads another gain, off by {off:.0%}")
model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
for layer in model:
    layer.is_loaded = True
kept = model[0].weight.detach().clone()
record = bigops.fuse_(model)
initialise(model)
if not torch.equal(model[0].weight, kept) and record.reason("0") is None:
    wrong.append("fuse_: the flag is gone, so loaded weights are initialised anew")
model = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
model[0].register_buffer("seen", torch.ones(3))
keys = set(model.state_dict())
record = bigops.fuse_(model)
if set(model.state_dict()) != keys and record.reason("0") is None:
    wrong.append(
        f"fuse_: {', '.join(sorted(keys - set(model.state_dict())))} went from the state_dict"
    )
if wrong:
    print("; ".join(wrong))
sys.exit(bool(wrong))
