"""What a receipt is made of: time, bytes and peak memory of whole models and of their layers."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigops import timing
from bigops.graph.sites import capture, contest, evaluating, run_example
from bigops.nn.layer import layer_of
from bigops.ops.choice import Choice


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model, each storage counted once, and of what
    frozen sparse layers keep beside them on a GPU.
    """
    total, seen = 0, set()
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen or storage.nbytes() == 0:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total + sum(layer.gpu_nbytes for layer in filter(None, map(layer_of, model.modules())))


class _Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that ops make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        inputs = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or _key(tensor) in inputs:
                continue
            storage, key = tensor.untyped_storage(), _key(tensor)
            if key not in self.live:
                self.live[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key)
        return out

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(model: nn.Module, example_inputs: Any) -> int:
    """Bytes of the model and of the most tensors that live at once during one forward pass.

    Counted from the tensors themselves, so it is the same in every run; the scratch space inside
    a kernel is not in it.
    """
    with evaluating(model), torch.no_grad(), _Meter() as meter:
        run_example(model, example_inputs)
    return model_bytes(model) + meter.peak


def compiled(model: nn.Module, example_inputs: Any) -> tuple[nn.Module | None, str]:
    """``torch.compile(model)``, already run once; or None and why it did not work."""
    try:
        module: Any = torch.compile(model)
        with evaluating(model), torch.inference_mode():
            run_example(module, example_inputs)
    except Exception as error:  # the backend may fail in many ways: no compiler, no support
        return None, f"torch.compile failed: {type(error).__name__}: {str(error)[:200]}"
    return module, ""


def latency(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    pairs: int = timing.MIN_PAIRS,
    decided: Callable[[dict[str, timing.Samples]], bool] = lambda samples: True,
    turns: int = 5,
) -> dict[str, timing.Samples]:
    """Seconds per inference call of each model, interleaved; every model in eval mode.

    Args:
        models: by name.
        example_inputs: as `run_example` takes them.
        pairs: rounds of one turn.
        decided: whether the samples so far are enough. While not, another turn is taken, and all
            rounds of all turns count.
        turns: at most this many.
    """
    sides: dict[str, Callable[[], object]] = {
        name: (lambda m=model: run_example(m, example_inputs))  # type: ignore[misc]
        for name, model in models.items()
    }
    first = next(iter(models.values()))
    device = next((t.device for t in first.parameters()), torch.device("cpu"))
    sync = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model, timed=True))
        stack.enter_context(torch.inference_mode())
        samples = timing.interleave(sides, pairs=pairs, sync=sync)
        for _ in range(turns - 1):
            if decided(samples):
                break
            more = timing.interleave(sides, pairs=pairs, sync=sync)
            samples = {name: np.concatenate([samples[name], more[name]]) for name in sides}
        return samples


def clear(ratio: timing.Ratio, floor: float | None) -> bool:
    """Whether the interval of a ratio lies wholly above or wholly below a floor."""
    return floor is None or ratio.low >= floor or ratio.high < floor


def explained(module: nn.Module, x: Tensor) -> Choice | None:
    """What `bigops.explain` says of a call of ``module`` on x, of several products the last.

    None of a layer without an op.
    """
    layer = layer_of(module)
    return None if layer is None else layer.explain(x)


def kernel_of(module: nn.Module, x: Tensor) -> str:
    """The kernel that serves ``module`` on x, as `bigops.explain` names it."""
    found = explained(module, x)
    return f"torch.{type(module).__name__}" if found is None else found.kernel


def without_kernel(module: nn.Module, x: Tensor) -> str | None:
    """Why no kernel serves ``module`` on x, so that plain torch does; None where one serves."""
    found = explained(module, x)
    if found is None or not found.kernel.startswith("reference."):
        return None
    return f"no kernel serves it on {x.device.type}: {found.reason}"


def _sizes(module: Any) -> tuple[int, int]:
    """[N, K] of a layer."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return int(module.out_features), int(module.in_features)


def layers(
    before: nn.Module, after: nn.Module, example_inputs: Any, pairs: int = timing.MIN_PAIRS
) -> list[dict[str, Any]]:
    """One entry per linear layer of ``after`` that ``before`` has at the same path.

    Entries have name, kind, shape, density, bytes_before, bytes_after, us_before, us_after (None
    where the example inputs do not call it) and kernel.
    """
    old = dict(before.named_modules())
    found: dict[str, nn.Module] = {
        name: module
        for name, module in after.named_modules()
        if name in old and (isinstance(module, nn.Linear) or layer_of(module) is not None)
    }
    inside = {f"{n}.{c}" for n, m in found.items() if layer_of(m) is not None for c in m._modules}
    found = {name: module for name, module in found.items() if name not in inside}
    seen = capture(after, found, example_inputs)
    rows = []
    for name, module in found.items():
        row: dict[str, Any] = {
            "name": name,
            "kind": type(module).__name__,
            "shape": list(_sizes(module)),
            "density": float(getattr(module, "density", 1.0)),
            "bytes_before": model_bytes(old[name]),
            "bytes_after": model_bytes(module),
            "us_before": None,
            "us_after": None,
            "kernel": "not called",
        }
        if name in seen:
            row["kernel"] = kernel_of(module, seen[name])
            with evaluating(old[name], timed=True), evaluating(module, timed=True):
                result = contest(old[name], module, seen[name], training=False, pairs=pairs)
            row["us_before"], row["us_after"] = result.us_before, result.us_after
        rows.append(row)
    return rows
