"""Writes torch's database of optimisers' samples to a file: ``python torch_samples.py FILE``.

A process of its own, since torch's test helpers switch global flags where they are imported, and
ask for a package (expecttest) that only their TestCase, which nobody here runs, is made of.
"""

import sys
import types
import unittest

import torch

sys.modules.setdefault("expecttest", types.ModuleType("expecttest"))
sys.modules["expecttest"].TestCase = unittest.TestCase

from torch.testing._internal.common_optimizers import optim_db  # noqa: E402

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
found = {}
for info in optim_db:
    if info.optim_cls in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        found[info.optim_cls.__name__] = {
            # None for params: the test's own.
            "good": {
                dtype: [(s.desc, s.kwargs) for s in info.optim_inputs_func("cpu", dtype)]
                for dtype in DTYPES
            },
            "bad": [
                (
                    bad.optimizer_error_input.desc,
                    bad.optimizer_error_input.params,
                    bad.optimizer_error_input.kwargs,
                    bad.error_type.__name__,
                )
                for bad in info.optim_error_inputs_func("cpu", torch.float32)
            ],
        }
torch.save(found, sys.argv[1])
