"""The models by name, and models of a user: ``module:factory``, or a folder."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigops.benches.harness import LeftOut, say_once
from bigops.benches.models import by_config, pretrained
from bigops.benches.models.subject import SAMPLES, Inputs, Subject

Make = Callable[[], Subject]

MODELS: dict[str, tuple[Make, ...]] = {
    "minilm": (
        partial(pretrained.minilm, "minilm", 8, 64, True),
        partial(pretrained.minilm, "minilm", 1, 32, False),
    ),
    "smollm2": (partial(pretrained.smollm2, "smollm2", False, 256),),
    "smollm2-step": (partial(pretrained.smollm2, "smollm2-step", True, 256),),
    "bert-base": (partial(by_config.bert, "bert-base"),),
    "albert": (partial(by_config.albert, "albert"),),
    "vit-b16": (partial(by_config.vit, "vit-b16"),),
    "t5-small": (partial(by_config.t5, "t5-small", False),),
    "t5-small-step": (partial(by_config.t5, "t5-small-step", True),),
    "llama-160m": (partial(by_config.llama, "llama-160m", False),),
    "llama-160m-step": (partial(by_config.llama, "llama-160m-step", True),),
}


def subjects(name: str) -> Iterator[Subject]:
    """All shapes of a model: one of `MODELS`, ``module:factory``, or a folder.

    A factory takes nothing and gives ``(model, example_inputs)`` or ``(model, example_inputs,
    calibration)``: a module of positional tensors and one output, a tensor or a tuple of them, and
    a list of tuples like it. What is not installed is left out by name.

    Raises:
        ValueError: no such model; or the factory gives something else.
    """
    for make in makers(name):
        try:
            yield make()
        except LeftOut as reason:
            say_once(f"{name} left out: {reason}")


def makers(name: str) -> tuple[Make, ...]:
    """What makes the subjects of a name.

    Raises:
        ValueError: no such model, module, factory or folder.
    """
    if name in MODELS:
        return MODELS[name]
    if Path(name).is_dir():
        return (partial(from_folder, Path(name)),)
    module, _, factory = name.partition(":")
    if factory:
        return (partial(from_factory, module, factory),)
    raise ValueError(
        f"model: expected one of {', '.join(MODELS)}, module:factory or a folder; got {name!r}"
    )


def from_factory(module: str, factory: str) -> Subject:
    """What a function of the user's gives.

    Raises:
        ValueError: no such module or function, or it gives something else.
    """
    where = f"{module}:{factory}"
    if os.getcwd() not in sys.path:  # as `python -m` has it
        sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), factory)()
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"model: {where}: {error}") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise ValueError(
            f"model: expected {where} to give (model, example_inputs) or with a list of "
            f"calibration inputs behind, got {type(made).__name__}"
        )
    model, example, *more = made
    inputs = _tensors(where, example)
    samples = [_tensors(where, one) for one in more[0]] if more else [inputs]
    return Subject(where, First(model).eval().requires_grad_(False), inputs, samples)


def _tensors(where: str, example: Any) -> Inputs:
    inputs = (example,) if isinstance(example, Tensor) else example
    if not isinstance(inputs, tuple) or not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError(f"model: expected a tensor or a tuple of tensors as inputs of {where}")
    return inputs


class First(nn.Module):
    """A model's first output: the model's own, or that of its tuple, mapping or dataclass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.model(*inputs)
        if isinstance(out, Tensor):
            return out
        found: Tensor = next(iter(out.values())) if hasattr(out, "values") else out[0]
        return found


# --- folders ---------------------------------------------------------------------------------


def from_folder(folder: Path) -> Subject:
    """A folder of transformers' ``save_pretrained``; or with the file of ``bigops.save`` beside its
    config, whose compressed weights are then taken as they are, dequantised for the other sides.

    Raises:
        LeftOut: transformers is not installed.
        ValueError: not such a folder, or a model that takes neither tokens nor pixels.
    """
    hf = by_config.transformers()
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: expected config.json of save_pretrained in {folder}")
    config = hf.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    kind = (config.architectures or ["nothing"])[0]
    if not hasattr(hf, kind):
        raise ValueError(f"model: {folder}: expected a class of transformers, got {kind}")
    file = folder / "model.safetensors"
    if file.is_file() and ours(file):
        import bigops

        model = dequantized(bigops.load(file, getattr(hf, kind)(config)))
    else:
        model = getattr(hf, kind).from_pretrained(str(folder), local_files_only=True)
    model = model.float().eval().requires_grad_(False)
    if getattr(config, "image_size", None):
        random = torch.Generator().manual_seed(0)
        size = config.image_size
        pixels = torch.randn(SAMPLES + 1, 1, 3, size, size, generator=random).unbind()
        samples = [(one,) for one in pixels]
        return Subject(folder.name, First(model).eval(), samples[0], samples[1:])
    if kind.endswith("ForCausalLM"):
        return by_config.causal(folder.name, model, config, False, by_config.PAST + 1)
    if getattr(config, "vocab_size", None) and not getattr(config, "is_encoder_decoder", False):
        encoder = by_config.text(folder.name, model, 8, 64, config.vocab_size)
        wrapped = Masked(model).eval()
        return Subject(folder.name, wrapped, encoder.inputs, encoder.calibration)
    raise ValueError(f"model: {folder}: expected a model of tokens or pixels, got {kind}")


class Masked(nn.Module):
    """ids, mask -> the first output of any of transformers' encoders."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        first: Tensor = self.model(input_ids=ids, attention_mask=mask)[0]
        return first


def ours(file: Path) -> bool:
    """Whether `bigops.save` wrote a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return any(key.startswith("bigops") for key in opened.metadata() or {})


def dequantized(model: nn.Module) -> nn.Module:
    """The model with an `nn.Linear` of equal weights in place of each compressed layer."""
    from bigops.nn.computed_weight import is_dense

    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not is_dense(layer):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            state = {"weight": layer.weight.detach() + 0.0, "bias": layer.bias}
            plain.load_state_dict({key: value for key, value in state.items() if value is not None})
            model.set_submodule(path, plain)
    return model
