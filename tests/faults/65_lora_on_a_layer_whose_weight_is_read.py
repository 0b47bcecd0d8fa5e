"""An adapter on a layer whose weight the model reads without calling it must act, or be refused.

The record says that the layer was adapted, yet the adapter gets no gradient and changes nothing
until merge(), which then changes the output. State-space mixers (``step.weight @ x``), routers in
float32 (``linear(x.float(), self.gate.weight.float())``) and attention by torch's functional form
(``q_proj_weight=self.q_proj.weight``) are written so.
"""

import sys

import torch
from torch import nn

import bigops


class Mixer(nn.Module):
    """Reads one layer's weight for a product in another layout, and adds its bias by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.step, self.out = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x).transpose(1, 2)
        h = self.step.weight @ h + self.step.bias[:, None]
        return self.out(torch.nn.functional.softplus(h).transpose(1, 2))


torch.manual_seed(0)
model, x = Mixer(), torch.randn(2, 5, 16)
try:
    record = bigops.add_lora_(model, rank=4)
except ValueError:
    sys.exit(0)  # refused, by name
if record.reason("step") is not None:
    sys.exit(0)  # left, with a reason
model(x).square().mean().backward()
adapter = model.step.adapters["default"]
with torch.no_grad():
    adapter.b.normal_()
    before = model(x)
    model.step.merge()
    moved = float((model(x) - before).abs().max())
dead = adapter.b.grad is None
if dead or moved > 1e-4:
    print(
        f"step: said to be adapted; gradient {'none' if dead else 'there'}, merge() moves the output by {moved:.2f}"
    )
    sys.exit(1)
