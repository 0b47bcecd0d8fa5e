"""torch.set_default_dtype must not reach into storage, grids and optimiser states.

Sources: pytorch/ao#2286, axolotl-ai-cloud/axolotl#3919.
"""

import os
import sys
import tempfile

import torch
from torch import nn

import bigops
from bigops.train import SGD, AdamW

F32 = torch.float32
x = torch.randn(64, 64, dtype=F32, generator=torch.Generator().manual_seed(1))
folder = tempfile.mkdtemp()
CONFIGS = {
    "Sparse": bigops.Sparse(0.5),
    "Sparse bf16": bigops.Sparse(0.5, values="bf16"),
    "Sparse + Int8": bigops.Sparse(0.5) + bigops.Int8(),
    "2:4": bigops.Sparse(pattern="2:4"),
    "Int8": bigops.Int8(),
    "Fp8": bigops.Fp8(),
}


def run(config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, dtype=F32), nn.ReLU(), nn.Linear(96, 32, dtype=F32))
    bigops.compress_(model.eval(), config)
    model[0].dense_weight() if hasattr(model[0], "dense_weight") else model[0].weight
    bigops.save(model, os.path.join(folder, "m.safetensors"))
    with torch.no_grad():
        return bigops.load(os.path.join(folder, "m.safetensors"))(x)


def grid(_):
    layer = bigops.nn.QuantLinear.from_linear(nn.Linear(64, 8, dtype=F32), activations="static")
    layer.calibrate(x)
    return layer.freeze().x_qparams


def sparse_static(_):
    torch.manual_seed(0)
    layer = bigops.nn.SparseLinear.from_linear(
        nn.Linear(64, 8, dtype=F32), 0.5, activations="static"
    )
    layer.calibrate(x)
    with torch.no_grad():
        return layer.freeze()(x)


def optimiser(cls):
    p = nn.Parameter(torch.ones(100, 100, dtype=F32))
    opt = cls([p], lr=1e-2, eight_bit=True, **({"momentum": 0.9} if cls is SGD else {}))
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
    return p.detach().clone()


JOBS = [(f"compress_, save, load: {n}", run, c) for n, c in CONFIGS.items()]
JOBS += [("static grid of QuantLinear", grid, None), ("static SparseLinear", sparse_static, None)]
JOBS += [(f"8-bit {c.__name__}", optimiser, c) for c in (AdamW, SGD)]
wrong = []
for name, job, argument in JOBS:
    want = job(argument)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            got = job(argument)
            if got.dtype != want.dtype or not torch.allclose(got, want, rtol=1e-5, atol=1e-6):
                wrong.append(f"{name} under {dtype}: another result")
        except Exception as error:
            wrong.append(f"{name} under {dtype}: {type(error).__name__}: {str(error)[:90]}")
        finally:
            torch.set_default_dtype(F32)
print("\n".join(wrong) or "ok")
sys.exit(bool(wrong))
