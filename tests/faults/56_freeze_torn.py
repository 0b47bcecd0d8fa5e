"""freeze_ and compress_ interrupted (Ctrl-C, MemoryError) at every line in turn: the model must be as it was. Torn: neither as before nor done. Exit 1 when torn, when a layer lost its weight, or when the change stays though the call raised."""

import collections
import os
import sys

import torch
from torch import nn

import bigops

ROOT = os.path.dirname(bigops.__file__)
x = torch.randn(4, 16)
import bigops.compress.apply as apply
from bigops import timing
from bigops.graph.sites import Contest

apply.contest = lambda *a, **k: Contest(2.0, 1.0, timing.Ratio(2.0, 1.9, 2.1))


def seq():
    return nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))


def recovery():
    m = seq()
    bigops.compress_(m, bigops.Sparse(0.5), freeze=False)
    return m


def state(m):
    return [
        (
            n,
            type(k).__name__,
            k.training,
            getattr(k, "frozen", None),
            getattr(k, "y_grid", None) is not None,
            sorted(
                (a, str(t.dtype), t.detach().float().sum().item(), t.requires_grad)
                for a, t in [*k._parameters.items(), *k._buffers.items()]
                if t is not None
            ),
        )
        for n, k in m.named_modules()
    ]


def run(f, m, k):
    n = 0

    def trace(frame, event, arg):
        nonlocal n
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        n += event in ("call", "line")
        if n == k and event in ("call", "line"):
            sys.settrace(None)
            raise KeyboardInterrupt(
                f"{os.path.relpath(frame.f_code.co_filename, ROOT)}:{frame.f_lineno}"
            )
        return trace

    sys.settrace(trace)
    try:
        f(m)
        return n, None
    except KeyboardInterrupt as e:
        return n, str(e)
    finally:
        sys.settrace(None)


bad = 0
for name, make, f in (
    ("compress_ int8", seq, lambda m: bigops.compress_(m, bigops.Int8())),
    ("compress_ static", seq, lambda m: bigops.compress_(m, bigops.Int8(activations="static"), x)),
    ("freeze_", recovery, bigops.freeze_),
):
    f(make())
    torch.manual_seed(0)
    m = make()
    events, _ = run(f, m, -1)
    full = state(m)
    count = collections.Counter()
    where = {}
    lost = 0
    for k in range(1, events + 1, 1 if name == "freeze_" else 3):
        torch.manual_seed(0)
        m = make()
        before = state(m)
        _, at = run(f, m, k)
        after = state(m)
        if at is None:
            continue  # fell into a generator's end, where Python drops it
        kind = (
            "unchanged"
            if after == before
            else "whole change, call raised"
            if after == full
            else "TORN"
        )
        count[kind] += 1
        where.setdefault(kind, at)
        lost += any(
            isinstance(l, bigops.nn.SparseLinear)
            and l._parameters.get("weight") is None
            and (not l.frozen or "values" not in l._parameters)
            for l in m
        )
    bad += count["TORN"] + count["whole change, call raised"]
    print(
        f"{name}: {dict(count)}; first at { ({k: v for k, v in where.items() if k != 'unchanged'}) }; a layer without weight and without storage: {lost}"
    )
sys.exit(bad > 0)
