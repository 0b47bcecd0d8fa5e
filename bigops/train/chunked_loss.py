"""chunked_loss_: the own loss of a model of transformers, its logits never made."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from bigops.graph.atomic import atomic
from bigops.graph.sites import Sites, evaluating
from bigops.nn import Linear
from bigops.train.logits import LossHead, NeededError

# The loss of a few tokens whose logits are rounded twice, or added up in another order.
RTOL = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 1e-5}


@atomic
def chunked_loss_(model: nn.Module, example_inputs: dict[str, Any] | None = None) -> nn.Module:
    """Let a model of transformers make its loss from chunks of logits.

    Afterwards ``model(input_ids, labels=labels).loss`` is what it was (shifted, without the ignored
    labels, by `num_items_in_batch`), and the logits [.., V] never exist: those in the output are
    `bigops.train.logits.Logits`, which are made when something reads their numbers, before the
    optimiser steps. Without labels, as in `generate`, nothing differs. Under `torch.compile` and
    torch.func the logits are made.

    It holds where the model makes its loss of its output embeddings' result by views, casts, a
    scale, a soft cap, a bias and cross entropy, whatever its type: a small run with labels shows
    whether it does, and whether the loss stays the same.

    Args:
        model: a `PreTrainedModel` whose output embeddings are an `nn.Linear` (or a plain
            `bigops.nn.Linear`), or a module around one. Changed in place; parameters and
            `state_dict` stay as they are, ties too.
        example_inputs: what the run takes, labels among them; by default a few tokens.

    Returns:
        The model.

    Raises:
        TypeError: no model with output embeddings and a forward that takes labels.
        ValueError: a head or a forward of another kind, by name, or a model that does not run on
            the inputs. The model is as it was.
    """
    sites = Sites(model)
    host = _host(model)
    head = host.get_output_embeddings()
    if isinstance(head, LossHead):
        return model
    path = next((path for path, module in sites.unique() if module is head), None)
    if path is None:
        raise ValueError(
            f"model: expected output embeddings that are one of its modules; got those of "
            f"{type(host).__name__}, a {type(head).__name__} outside of it"
        )
    reason = sites.reason_to_leave(path, (nn.Linear, Linear), False, keys_stay=True, ties=True)
    if reason is None and getattr(head, "activation", "none") != "none":
        reason = f"it has the activation {head.activation}"
    if reason is not None:
        raise ValueError(f"model: expected a head that is a plain linear layer; {path}: {reason}")
    inputs = _inputs(host) if example_inputs is None else dict(example_inputs)
    before = _loss(host, inputs)
    new = LossHead.from_linear(head, isinstance(head, Linear))
    sites.swap({path: new})
    host.register_forward_pre_hook(_begin, with_kwargs=True)
    host.register_forward_hook(_end, always_call=True)
    new.strict = True
    try:
        after = _loss(host, inputs)
    except NeededError as error:
        raise ValueError(
            f"model: expected a forward that makes the loss from the logits by views, casts, a "
            f"scale, a soft cap, a bias and cross entropy; {type(host).__name__} needs their "
            f"numbers in {error}"
        ) from None
    new.strict = False
    near = RTOL.get(head.weight.dtype, RTOL[torch.float32])
    if not torch.allclose(after, before, rtol=near, atol=0, equal_nan=True):
        raise ValueError(
            f"model: expected a loss that stays the same; {type(host).__name__} gives "
            f"{float(before)}, from chunks of logits {float(after)}"
        )
    return model


def _host(model: nn.Module) -> Any:
    """The model of transformers in ``model`` that takes labels."""
    for module in model.modules():
        embeddings = getattr(type(module), "get_output_embeddings", None)
        if embeddings is None or "labels" not in inspect.signature(type(module).forward).parameters:
            continue
        if isinstance(embeddings(module), nn.Module):
            return module
    raise TypeError(
        "model: expected one with output embeddings (get_output_embeddings) whose forward takes "
        f"labels; got {type(model).__name__}"
    )


def _inputs(host: Any) -> dict[str, Any]:
    """A few tokens, for a model that says what it takes."""
    config, device = host.config, next(host.parameters()).device
    tokens = torch.arange(12, device=device).reshape(2, 6) % min(8, config.vocab_size)
    if getattr(host, "main_input_name", "input_ids") == "input_features":
        size = 2, config.num_mel_bins, 2 * config.max_source_positions
        features = torch.zeros(size, device=device, dtype=host.dtype)
        return {"input_features": features, "labels": tokens}
    labels = tokens.clone()
    labels[0, 0] = -100
    return {"input_ids": tokens, "labels": labels}


def _loss(host: Any, inputs: dict[str, Any]) -> Tensor:
    with evaluating(host), torch.no_grad():
        try:
            loss = host(**inputs).loss
        except NeededError:
            raise
        except Exception as error:
            raise ValueError(
                f"example_inputs: expected what {type(host).__name__} runs on, with labels; got "
                f"{', '.join(inputs)}: {error}"
            ) from error
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"example_inputs: expected inputs that give a loss; {type(host).__name__} gave "
            f"{type(loss).__name__} for {', '.join(inputs)}"
        )
    return loss


def _begin(host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    head = host.get_output_embeddings()
    if isinstance(head, LossHead):
        given = inspect.signature(type(host).forward).bind_partial(host, *args, **kwargs)
        head.lazy = given.arguments.get("labels") is not None


def _end(host: Any, args: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    head = host.get_output_embeddings()
    if isinstance(head, LossHead):
        head.lazy = False
