"""Small models of every kind and format that `bigops.save` stores, for the tests of files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bigops import W4A8, Fp8, Int4, Int8, LowRank, Sparse
from bigops.compress import file_format
from bigops.compress.build import Choice, build
from bigops.compress.config import Config
from bigops.formats import Fp8Weight
from bigops.nn import (
    CompressedLinear,
    GatedMLP,
    Linear,
    MultiheadAttention,
    PackedGatedMLP,
    PackedLinear,
    PackedLowRankLinear,
    QuantEmbedding,
)

K, N = 36, 10

DENSE = "dense"
PACKED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "by its format": lambda old: CompressedLinear.from_linear(Fp8Weight, old, scales="tensor"),
    "packed": PackedLinear.from_linear,
    "packed low rank": lambda old: PackedLowRankLinear(old.in_features, old.out_features, 6),
    "packed gated": lambda old: PackedGatedMLP(
        old.in_features, 24, old.out_features, bias=True, frozen=False
    ),
}
FORMATS: dict[str, Config | str] = {
    DENSE: DENSE,
    **{name: name for name in PACKED},
    "int8": Int8(),
    "int8 static": Int8(activations="static"),
    "int8 zero points": Int8(symmetric=False),
    "int8 groups": Int8(activations="none", group=32, symmetric=False),
    "int4": Int4(),
    "w4a8": W4A8,
    "fp8": Fp8(),
    "fp8 blocks": Fp8(scales="block", activations="none"),
    "sparse fp32": Sparse(0.7, "1x1"),
    "sparse bf16": Sparse(0.7, "4x1", "bf16"),
    "sparse int8": Sparse(0.7) + Int8(),
    "2:4": Sparse(pattern="2:4"),
    "low rank": LowRank(6),
    "low rank int8": LowRank(6) + Int8(),
}


def compressed(name: str, freeze: bool = True, k: int = K, n: int = N) -> nn.Sequential:
    """Two layers of one format, an activation in between."""
    model = nn.Sequential(nn.Linear(k, n), nn.Tanh(), nn.Linear(n, 7)).eval()
    config = FORMATS[name]
    for i in () if config == DENSE else (0, 2):
        old = model[i]
        qparams = (0.02, 128.0)
        new = (
            PACKED[config](old) if isinstance(config, str) else build(old, Choice(config, qparams))
        )
        model[i] = new.freeze() if freeze and hasattr(new, "freeze") else new
    return model.eval()


def _part_compressed() -> nn.Module:
    """A gated block of which `compress_` takes the down projection alone."""
    mlp = GatedMLP(4, 6, 5, bias=True)
    mlp.down_proj = build(mlp.down_proj, Choice(Int8())).freeze()
    return mlp


def _attention_compressed() -> nn.Module:
    """An attention of which one projection is compressed."""
    attention = MultiheadAttention(4, 2, batch_first=True)
    attention.in_proj = build(attention.in_proj, Choice(Int8())).freeze()  # type: ignore[attr-defined]
    return attention


KINDS: dict[str, Callable[[], nn.Module]] = {
    "Identity": nn.Identity,
    "ReLU": lambda: nn.ReLU(inplace=True),
    "GELU": lambda: nn.GELU("tanh"),
    "SiLU": nn.SiLU,
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "Softmax": lambda: nn.Softmax(-1),
    "LogSoftmax": lambda: nn.LogSoftmax(dim=1),
    "Flatten": lambda: nn.Flatten(1, -1),
    "Dropout": lambda: nn.Dropout(0.25),
    "LayerNorm": lambda: nn.LayerNorm([3, 4], eps=1e-3, bias=False),
    "Embedding": lambda: nn.Embedding(5, 4, padding_idx=-1, max_norm=2.0),
    "torch.Linear": lambda: nn.Linear(5, 3, bias=False),
    "bigops.Linear": lambda: Linear(5, 3, activation="gelu"),
    "bigops.GatedMLP": lambda: GatedMLP(4, 6, 5, bias=True),
    "GatedMLP compressed": _part_compressed,
    "bigops.QuantEmbedding": lambda: QuantEmbedding(5, 4, 1, bits=4).freeze(),
    "bigops.MultiheadAttention": lambda: MultiheadAttention(4, 2, 0.1, bias=False),
    "MultiheadAttention compressed": _attention_compressed,
}
"""The kinds that are no format of `FORMATS` and no container, and a kind with a swapped part."""


def every_kind() -> nn.ModuleDict:
    """Each kind once, in each container, with a tie, a fixed parameter and an empty layer."""
    model = nn.ModuleDict({name.replace(".", " "): make() for name, make in KINDS.items()})
    model["list"] = nn.ModuleList([nn.Sequential(nn.Linear(4, 0)), nn.Embedding(3, 4)])
    model["tied"] = nn.Linear(4, 5, bias=False)
    model["tied"].weight = model["Embedding"].weight
    model["bigops Linear"].bias.requires_grad_(False)
    return model


def every_format(freeze: bool = True, k: int = K, n: int = N) -> nn.ModuleDict:
    """Each format once."""
    return nn.ModuleDict({name: compressed(name, freeze, k, n) for name in FORMATS})


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the state's tensors."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether names, order, shapes, dtypes and bits of the model's state are those given."""
    own = model.state_dict()
    return list(own) == list(state) and all(
        t.dtype == state[n].dtype and t.shape == state[n].shape and _same_bits(t, state[n])
        for n, t in own.items()
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    flat = (t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b))
    return not a.numel() or torch.equal(*flat)


def rewrite(path: Path, change: Callable[[Any, dict[str, Tensor]], object]) -> None:
    """Change header or tensors of a file, with right checksums."""
    header, tensors = _parts(path)
    change(header, tensors)
    file_format.write(path, tensors, header, None)


def rewrite_as_older(path: Path, change: Callable[[Any, dict[str, Tensor]], object]) -> None:
    """The same without checksums, as files were: the checks behind them are met.

    A text that ``change`` returns is the whole header.
    """
    header, tensors = _parts(path)
    header.pop("checksums")
    text = change(header, tensors)
    if not isinstance(text, str):
        text = json.dumps(header)
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    save_file(tensors, path, metadata={"bigops": text})


def _parts(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["bigops"]), tensors
