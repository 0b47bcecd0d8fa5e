"""add_lora_ says that on an error the model is as it was; an adapter name that is refused leaves the first layer frozen; exit 1 then."""

import sys

from torch import nn

import bigops

bad = 0
for name in ("a.b", "", "keys"):
    m = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    try:
        bigops.add_lora_(m, rank=2, name=name)
        got = "ok"
    except Exception as e:
        got = f"{type(e).__name__}: {e}"
    flags = [p.requires_grad for p in m.parameters()]
    bad += not all(flags)
    print(repr(name), got, "| requires_grad", flags)
sys.exit(bad > 0)
