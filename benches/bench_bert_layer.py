"""One BERT-base encoder layer: what the ops are worth where attention and norms stay as they are.

A case has m = batch x tokens rows, hidden size k (heads of 64) and n features in the feed-forward
part. The error of a row is against the float64 model as it is, and for the sparse form against the
float64 model with the pruned weights: what pruning costs belongs to a receipt.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigops
from bigops.benches import rivals_bert
from bigops.benches.harness import OWN, Case, Side, compiled, optional_side
from bigops.benches.limits import Cost
from bigops.benches.models import own
from bigops.compress import Int8, Sparse
from bigops.compress.config import Configs

HEAD = 64
SPARSITY = 0.8


class EncoderLayer(nn.Module):
    """BERT's encoder layer, norms after the sums; x [batch, tokens, hidden] -> the same shape."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.heads = hidden // HEAD
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.ffn = nn.Sequential(nn.Linear(hidden, inner), nn.GELU(), nn.Linear(inner, hidden))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape

        def heads(y: Tensor) -> Tensor:  # [batch, heads, tokens, 64]
            return y.view(batch, tokens, self.heads, HEAD).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        )
        x = self.norm1(x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, hidden)))
        return self.norm2(x + self.ffn(x))


def cases() -> list[Case]:
    """128 tokens, alone and eight at a time."""
    return [
        Case(
            "bert_layer",
            f"layer-b{batch}",
            batch * 128,
            768,
            3072,
            params={"batch": batch, "heads": 768 // HEAD},
            quick=batch == 1,
        )
        for batch in (1, 8)
    ]


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    batch = int(case.params["batch"])
    tokens = case.m // batch
    with torch.inference_mode(False):  # inference tensors cannot become parameters
        model = EncoderLayer(case.k, case.n).to(device).eval().requires_grad_(False)
        x = torch.randn(batch, tokens, case.k, device=device)
        pruned = own.pruned(model, SPARSITY)
        weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        flops = 2.0 * case.m * weights + 4.0 * case.m * tokens * case.k

        def cost(unit: str, size: float) -> Cost:
            return Cost(unit, flops, size * weights)

        frozen_bf16 = _frozen_bf16(model, x)
        reference = [_wide(model, x)]
        sides = [
            _own(f"{OWN} int8", model, x, Int8(), cost("int8", 1)),
            _own(
                f"{OWN} sparse int8 {SPARSITY:.0%}",
                model,
                x,
                Sparse(SPARSITY) + Int8(),
                # useful work: the blocks kept, and the attention
                Cost("int8", flops - SPARSITY * 2.0 * case.m * weights, 0.25 * weights),
                [_wide(pruned, x)],
            ),
            Side("eager", lambda: model(x), cost("fp32", 4), "aten"),
            _compiled(model, x, cost("fp32", 4)),
            Side("torch.compile bf16", frozen_bf16, cost("bf16", 2), "inductor frozen"),
        ]
        if device == "cpu":
            dynamic = _dynamic(model)
            sides.append(
                Side("torch int8", lambda: dynamic(x), cost("int8", 1), "quantize_dynamic")
            )
            layer = rivals_bert.record(model, x)
            for form in rivals_bert.OPENVINO:
                optional_side(sides, rivals_bert.openvino, layer, form, cost)
            optional_side(sides, rivals_bert.onnxruntime, layer, cost)
    return reference, sides


def _wide(model: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(model).double().cpu()(x.double().cpu())


def _own(
    name: str,
    model: nn.Module,
    x: Tensor,
    config: Configs,
    cost: Cost,
    reference: list[Tensor] | None = None,
) -> Side:
    """Activations fused and every linear layer compressed, none of them by trial."""
    ours = copy.deepcopy(model)
    bigops.fuse_(ours)
    bigops.compress_(ours, config)
    return Side(name, lambda: ours(x), cost, reference=reference)


def _compiled(model: nn.Module, x: Tensor, cost: Cost) -> Side:
    ready = compiled(model)
    return Side("torch.compile", lambda: ready(x), cost, "inductor")


def _frozen_bf16(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """torch.compile with its weights folded in as constants; compiled at its first call."""
    narrow, x16 = copy.deepcopy(model).bfloat16(), x.bfloat16()
    ready = compiled(narrow)
    done: list[bool] = []

    def call() -> Tensor:
        if done:
            return ready(x16)
        # read while it compiles; freezing wants no_grad, not inference mode
        from torch._inductor import config

        with config.patch(freezing=True), torch.inference_mode(False), torch.no_grad():
            ready(x16)
        done.append(True)
        return ready(x16)

    return call


def _dynamic(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated; still the int8 that torch users know
        return torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
        )


def test_bert_layer(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
