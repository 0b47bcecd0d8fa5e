"""A compressed model, and each of its layers, against its twin of dequantised weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigops.nn import QuantEmbedding
from bigops.nn.computed_weight import ComputedLinear
from tests.accept.census.tiny import outputs

LAYER_DB = 50.0  # of one layer whose x is rounded alike; rounding itself costs about 44
MODEL_DB = 30.0  # of a whole model that does not amplify noise


class WrongError(AssertionError):
    """A number that is not that of the reference."""


def rounded(x: Tensor) -> Tensor:
    """x as products with dynamic activations take it: each row in 8 bits, with its zero point."""
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    step = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).tiny)
    zero = torch.round(-low / step)
    return ((torch.round(x / step) + zero).clamp(0, 255) - zero) * step


def hold_layers(
    model: nn.Module,
    twin: nn.Module,
    inputs: dict[str, Any],
    take: Callable[[Tensor], Tensor] = rounded,
    least: float = LAYER_DB,
) -> None:
    """Each compressed layer, on what the model gives it, against that of its dequantised twin.

    Args:
        take: what the product does with x.
        least: signal to noise, in dB.
    """
    wrong: list[str] = []

    def watch(path: str, reference: Any) -> Callable[..., None]:
        weight, bias = reference.weight.double(), reference.bias
        bias = None if bias is None else bias.double()

        def hook(layer: Any, args: Any, kwargs: Any, y: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            db = snr(y, F.linear(take(x).double(), weight, bias)) if y.numel() else least
            if not db >= least:
                wrong.append(f"{path}: {db:.1f} dB")

        return hook

    handles = [
        model.get_submodule(path).register_forward_hook(
            watch(path, twin.get_submodule(path)), with_kwargs=True
        )
        for path in compressed_layers(model)
    ]
    with torch.no_grad():
        found = outputs(model, inputs)
    for handle in handles:
        handle.remove()
    if wrong:
        raise WrongError("; ".join(wrong[:3]))
    if not all(bool(t.isfinite().all()) for t in found):
        raise WrongError("an output is not finite")


def hold_model(model: nn.Module, twin: nn.Module, inputs: dict[str, Any]) -> None:
    """The whole against its dequantised twin: `MODEL_DB`, or what rounding x costs the twin.

    What the noise of 8 bits does to a model depends on the model (routing, argmax, recurrence), so
    below `MODEL_DB` it is measured: the twin runs with `rounded` inputs of its layers, and the
    model may be 3 dB below that.
    """
    with torch.no_grad():
        got, exact = outputs(model, inputs), outputs(twin, inputs)
        handles = [
            twin.get_submodule(path).register_forward_pre_hook(
                lambda layer, args, kwargs: (tuple(map(rounded, args)), kwargs), with_kwargs=True
            )
            for path in compressed_layers(model)
        ]
        simulated = outputs(twin, inputs)
        for handle in handles:
            handle.remove()
    for i, (a, b, c) in enumerate(zip(got, exact, simulated, strict=True)):
        if a.shape != b.shape:
            raise WrongError(f"output {i}: shape {list(a.shape)}, that of the twin {list(b.shape)}")
        db, cost = snr(a, b.double()), snr(c, b.double())
        if not db >= min(MODEL_DB, cost - 3):
            raise WrongError(f"output {i}: {db:.1f} dB, the twin with rounded inputs {cost:.1f} dB")


def compressed_layers(model: nn.Module) -> list[str]:
    """The paths of the layers whose weight is stored in another form."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, ComputedLinear) and module.computes_weight
    ]


def dequantised(model: nn.Module) -> nn.Module:
    """A copy whose compressed layers are torch's own by their dequantised weights."""
    twin = copy.deepcopy(model)
    for path, module in model.named_modules():
        if isinstance(module, QuantEmbedding):
            rows = nn.Embedding.from_pretrained(module.weight.detach().clone())
            above, _, leaf = path.rpartition(".")
            setattr(twin.get_submodule(above), leaf, rows)
    for path in compressed_layers(model):
        layer: Any = twin.get_submodule(path)
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        new.weight = nn.Parameter(layer.weight.detach().clone())
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach().clone())
        above, _, leaf = path.rpartition(".")
        setattr(twin.get_submodule(above), leaf, new.train(layer.training))
    return twin


def snr(got: Tensor, reference: Tensor) -> float:
    """Signal to noise in dB; inf where they are equal."""
    noise = (got.double() - reference).square().sum()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(reference.double().square().sum() / noise))
