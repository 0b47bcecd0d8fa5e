"""An index that names a word twice in a row: load and validate take it, the forward adds both up, the gradient says that the storage is broken and that validate tells where; exit 1 when the two disagree."""

import sys

import torch

from bigops import sparse_linear
from bigops.formats import SparseWeight

s = SparseWeight.from_mask(torch.randn(64, 64), torch.rand(64, 64) < 0.9, torch.float32, (1, 1))
s = s.replace(index=torch.zeros_like(s.index))
x = torch.randn(3, 64, requires_grad=True)
try:
    s.validate()
    valid = True
except ValueError as e:
    valid = False
    print("validate:", e)
y = sparse_linear(x, s)
try:
    y.sum().backward()
    broken = False
except RuntimeError as e:
    broken = True
    print("gradient:", str(e)[-130:])
print("validate passes:", valid, "| gradient refuses:", broken)
sys.exit(valid and broken)
