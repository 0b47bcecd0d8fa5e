"""bigops: fused, quantised and sparse linear layers for PyTorch that really are faster.

Names are imported on first use, so that `import bigops` costs no more than torch. So are the ops,
whose registration takes a fifth of that time.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "QuantizedRows": "bigops.formats.quantize",
    "act_quant": "bigops.ops.act_quant",
    "attention": "bigops.ops.attention",
    "fp8_linear": "bigops.ops.fp8_linear",
    "fused_adamw": "bigops.ops.fused_adamw",
    "fused_grad_norm": "bigops.ops.fused_adamw",
    "fused_linear": "bigops.ops.fused_linear",
    "low_rank_linear": "bigops.ops.low_rank_linear",
    "norm": "bigops.ops.norm",
    "norm_act_quant": "bigops.ops.norm",
    "norm_with_sum": "bigops.ops.norm",
    "packed_linear": "bigops.ops.packed_linear",
    "fused_sgd": "bigops.ops.fused_adamw",
    "linear_cross_entropy": "bigops.ops.linear_cross_entropy",
    "linear_js_div": "bigops.ops.linear_cross_entropy",
    "linear_kl_div": "bigops.ops.linear_cross_entropy",
    "quantized_embedding": "bigops.ops.quantized_embedding",
    "quantized_linear": "bigops.ops.quantized_linear",
    "rotary": "bigops.ops.rotary",
    "sparse_linear": "bigops.ops.sparse_linear",
    "explain": "bigops.ops.explain",
    "report": "bigops.ops.report",
    "amp": "bigops.train",
    "add_lora_": "bigops.graph.add_lora",
    "deploy": "bigops.graph.deploy",
    "fuse_": "bigops.graph.fuse",
    "pack_": "bigops.graph.pack",
    "plain": "bigops.graph.plain",
    "unpack_": "bigops.graph.pack",
    "Fp8": "bigops.compress.config",
    "Int4": "bigops.compress.config",
    "Int8": "bigops.compress.config",
    "LowRank": "bigops.compress.config",
    "Sparse": "bigops.compress.config",
    "W4A8": "bigops.compress.config",
    "compress_": "bigops.compress.apply",
    "freeze_": "bigops.compress.apply",
    "Floors": "bigops.compress.receipt",
    "Receipt": "bigops.compress.receipt",
    "FormatError": "bigops.files",
    "smooth_": "bigops.compress.smooth",
    "load": "bigops.compress.store",
    "save": "bigops.compress.store",
}
_ROOMS = (
    "backend",
    "compress",
    "formats",
    "graph",
    "nn",
    "ops",
    "optim",
    "parallel",
    "timing",
    "train",
)

__all__ = [
    "W4A8",
    "Floors",
    "FormatError",
    "Fp8",
    "Int4",
    "Int8",
    "LowRank",
    "QuantizedRows",
    "Receipt",
    "Sparse",
    "act_quant",
    "add_lora_",
    "amp",
    "attention",
    "compress",
    "compress_",
    "deploy",
    "explain",
    "formats",
    "fp8_linear",
    "freeze_",
    "fuse_",
    "fused_adamw",
    "fused_grad_norm",
    "fused_linear",
    "fused_sgd",
    "linear_cross_entropy",
    "linear_js_div",
    "linear_kl_div",
    "load",
    "low_rank_linear",
    "nn",
    "norm",
    "norm_act_quant",
    "norm_with_sum",
    "ops",
    "pack_",
    "packed_linear",
    "parallel",
    "plain",
    "quantized_embedding",
    "quantized_linear",
    "report",
    "rotary",
    "save",
    "smooth_",
    "sparse_linear",
    "train",
    "unpack_",
]

if TYPE_CHECKING:
    from bigops import compress, formats, nn, ops, parallel, train
    from bigops.compress.apply import compress_, freeze_
    from bigops.compress.config import W4A8, Fp8, Int4, Int8, LowRank, Sparse
    from bigops.compress.receipt import Floors, Receipt
    from bigops.compress.smooth import smooth_
    from bigops.compress.store import load, save
    from bigops.files import FormatError
    from bigops.formats.quantize import QuantizedRows
    from bigops.graph.add_lora import add_lora_
    from bigops.graph.deploy import deploy
    from bigops.graph.fuse import fuse_
    from bigops.graph.pack import pack_, unpack_
    from bigops.graph.plain import plain
    from bigops.ops.act_quant import act_quant
    from bigops.ops.attention import attention
    from bigops.ops.explain import explain
    from bigops.ops.fp8_linear import fp8_linear
    from bigops.ops.fused_adamw import fused_adamw, fused_grad_norm, fused_sgd
    from bigops.ops.fused_linear import fused_linear
    from bigops.ops.linear_cross_entropy import (
        linear_cross_entropy,
        linear_js_div,
        linear_kl_div,
    )
    from bigops.ops.low_rank_linear import low_rank_linear
    from bigops.ops.norm import norm, norm_act_quant, norm_with_sum
    from bigops.ops.packed_linear import packed_linear
    from bigops.ops.quantized_embedding import quantized_embedding
    from bigops.ops.quantized_linear import quantized_linear
    from bigops.ops.report import report
    from bigops.ops.rotary import rotary
    from bigops.ops.sparse_linear import sparse_linear
    from bigops.train import amp


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"bigops.{name}")
    raise AttributeError(f"module 'bigops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})


def _hold_namespace() -> None:
    """Let a look-up in `torch.ops.bigops` register the ops; torch.export.load asks there."""
    import torch

    class Ops(torch._ops._OpNamespace):
        __module__ = torch._ops.__name__  # ops are written down by that of their namespace

        def __getattr__(self, name: str) -> Any:
            if not name.startswith("__"):
                importlib.import_module("bigops.ops")
            return super().__getattr__(name)

    torch.ops.bigops = Ops("bigops")  # type: ignore[attr-defined]


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Calls `_hold_namespace` once torch is imported, which the command's help never needs."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _hold_namespace()

            loader.exec_module = exec_module
        return spec


if "torch" in sys.modules:
    _hold_namespace()
else:
    sys.meta_path.insert(0, _AfterTorch())
