"""nn.Linear(np.prod(shape), 64) works in torch; the verbs must take it, or leave the layer.

Sources: carpedm20/BEGAN-tensorflow#17 (np.prod gives numpy.int64), huggingface/transformers#24340.
"""

import os
import sys
import tempfile

import numpy as np
import torch
from torch import nn

import bigops


def model():
    return nn.Sequential(nn.Linear(np.prod((8, 8)), 64), nn.Tanh(), nn.Linear(64, 4)).eval()


def saved():
    path = os.path.join(tempfile.mkdtemp(), "m.safetensors")
    bigops.save(model(), path)
    bigops.load(path)


JOBS = {
    "fuse_": lambda: bigops.fuse_(model()),
    "compress_": lambda: bigops.compress_(model(), bigops.Int8()),
    "add_lora_": lambda: bigops.add_lora_(model(), rank=2),
    "save, load": saved,
    "LinearCrossEntropy.from_linear": lambda: bigops.nn.LinearCrossEntropy.from_linear(model()[0]),
}
wrong = []
for name, job in JOBS.items():
    try:
        job()
    except Exception as error:
        wrong.append(f"{name}: {type(error).__name__}: {error}")
print("\n".join(wrong) or "ok")
sys.exit(bool(wrong))
