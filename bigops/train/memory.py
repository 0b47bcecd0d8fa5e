"""checkpoint_: activations of a model's blocks made anew in the backward pass."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from bigops.graph.atomic import atomic
from bigops.train.saved_bytes import Held, held, seconds
from bigops.train.saved_masks import masks_in_bytes

POLICIES = ("full", "selective", "masks", "none")

_PRODUCTS = {
    f"aten::{name}"
    for name in (
        *("mm", "bmm", "addmm", "baddbmm", "linear", "convolution"),
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
        *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_cudnn_attention"),
        *("_scaled_mm", "_int_mm", "mkldnn_linear"),
    )
} | {"mkldnn::_linear_pointwise"}


class CheckpointReport(NamedTuple):
    """What `checkpoint_` did. Bytes are None where no example_inputs were given."""

    blocks: list[str]
    """Names of the blocks that are made anew."""
    found: int
    """Blocks that the model has."""
    saved_before: int | None
    """Bytes that a forward pass on the example keeps, beyond parameters, states and inputs."""
    saved_after: int | None
    peak_before: int | None
    """The most bytes of forward and backward pass at a time, gradients included."""
    peak_after: int | None


class Checkpointed:
    """Stands for `forward` on a block: runs the class's, whose graph then keeps less."""

    def __init__(self, module: nn.Module, policy: str) -> None:
        self.module = module
        self.policy = policy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = partial(type(self.module).forward, self.module)
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        if self.policy == "masks":
            if torch.compiler.is_compiling():  # which keeps masks in bytes by itself
                return run(*args, **kwargs)
            with masks_in_bytes():
                return run(*args, **kwargs)
        args = tuple(None if _is_cache(value) else value for value in args)
        kwargs = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        if self.policy == "selective":
            kwargs["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(run, *args, use_reentrant=False, **kwargs)


def _is_cache(value: Any) -> bool:
    """Whether it is a cache of keys and values (of transformers), which a second run would extend
    again."""
    return not isinstance(value, torch.Tensor) and hasattr(value, "get_seq_length")


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Products and attention are kept, all else is made anew."""
    name = op._schema.name if isinstance(op, torch._ops.OpOverload) else ""
    ours = name.startswith("bigops::") and ("linear" in name or "attention" in name)
    if ours or name in _PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@atomic
def checkpoint_(
    model: nn.Module,
    policy: str | int = "full",
    example_inputs: Any = None,
    *,
    blocks: Iterable[str | nn.Module] | None = None,
) -> CheckpointReport:
    """Let blocks of a model keep less for the backward pass, which makes the rest anew.

    Gradients have the bits that they had, dropout included; parameters and `state_dict` stay as
    they are. Method: Chen et al., arXiv 1604.06174, by `torch.utils.checkpoint` (non-reentrant; the
    selective policy by its `create_selective_checkpoint_contexts`). Blocks of transformers get no
    cache of keys and values while gradients are made. A second call takes the first one's place.
    Call it before `torch.compile`.

    Args:
        model: changed in place.
        policy: "full": each block keeps its input alone. "selective": it keeps the results of
            products and attention, too. "masks": nothing is made anew; dropout's masks, which the
            CPU keeps as floats, are kept in bytes. A number: the bytes that a forward pass on
            ``example_inputs`` may keep (parameters and inputs not counted); as many blocks as that
            takes keep their input alone, those first that cost the least time for a byte. "none":
            undo it.
        example_inputs: of a training step, as for `bigops.fuse_`: a mapping gives keywords, a
            tuple positions, all else is x; the loss is the result's ``loss`` where it has one.
            Needed for a number; with it the report has bytes, under the autocast that is on.
        blocks: modules of the model or their names; by default the items of each `nn.ModuleList`
            and `nn.Sequential` of at least two modules of one class that has children.

    Returns:
        A `CheckpointReport`.

    Raises:
        TypeError, ValueError: a policy, a block or inputs of another kind; a number of bytes that
            no choice of blocks keeps to; a model that checkpoints by itself. The model is as it
            was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    _check_policy(policy, example_inputs)
    found = _repeated(model) if blocks is None else _named(model, blocks)
    if not found and policy != "none":
        raise ValueError(
            "blocks: expected modules to make anew; the model has no list of modules of one class"
        )
    for path, block in model.named_modules():
        if getattr(block, "gradient_checkpointing", False) is True:
            raise ValueError(
                f"model: expected no checkpointing of its own; {path or 'the model'} has it on "
                "(gradient_checkpointing_disable turns it off)"
            )
        if isinstance(vars(block).get("forward"), Checkpointed):
            del block.forward
    for path, block in found.items():
        if "forward" in vars(block):
            raise ValueError(
                f"blocks: expected blocks with their class's forward; {path} has its own"
            )
    before = after = None if example_inputs is None else held(model, example_inputs, found)
    if isinstance(policy, str):
        chosen = [] if policy == "none" else list(found)
        _only(found, chosen, policy)
        if chosen and example_inputs is not None:
            after = held(model, example_inputs, found)
    else:
        assert before is not None
        chosen, after = _within(model, example_inputs, found, policy, before)
    return CheckpointReport(
        chosen,
        len(found),
        *(None if h is None else h.saved for h in (before, after)),
        *(None if h is None else h.peak for h in (before, after)),
    )


def _only(found: Mapping[str, nn.Module], chosen: list[str], policy: str = "full") -> None:
    """Let just the chosen blocks keep less."""
    for path, block in found.items():
        vars(block).pop("forward", None)
        if path in chosen:
            block.forward = Checkpointed(block, policy)  # type: ignore[method-assign, assignment]


def _within(
    model: nn.Module, example_inputs: Any, found: Mapping[str, nn.Module], budget: int, before: Held
) -> tuple[list[str], Held]:
    """As few blocks as keep to the budget, the cheapest first, and what the model then holds."""
    cost = seconds(model, example_inputs, found)
    # what no forward pass went through has no cost, and saves nothing
    order = sorted(cost, key=lambda path: cost[path] / max(1, before.of[path]))
    by_count = {0: before}

    def of_first(count: int) -> Held:
        if count not in by_count:
            _only(found, order[:count])
            by_count[count] = held(model, example_inputs, found)
        return by_count[count]

    least = of_first(len(order)).saved
    if least > budget:
        raise ValueError(
            f"policy: expected at least {least} bytes, which the model keeps with all "
            f"{len(order)} blocks made anew; got {budget}"
        )
    count = bisect_left(range(len(order)), True, key=lambda n: of_first(n).saved <= budget)
    after = of_first(count)
    _only(found, order[:count])
    return order[:count], after


def _check_policy(policy: str | int, example_inputs: Any) -> None:
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(
                f"policy: expected one of {', '.join(POLICIES)} or a number of bytes; got "
                f"{policy!r}"
            )
        return
    if isinstance(policy, bool) or not isinstance(policy, int):
        raise TypeError(
            f"policy: expected a word or a whole number of bytes; got {type(policy).__name__}"
        )
    if policy < 0:
        raise ValueError(f"policy: expected at least 0 bytes; got {policy}")
    if example_inputs is None:
        raise ValueError("example_inputs: expected inputs to measure on for a policy in bytes")


def _repeated(model: nn.Module) -> dict[str, nn.Module]:
    """The items of the outermost lists of modules of one class, by name."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if any(path == block or path.startswith(f"{block}.") for block in found):
            continue
        items = list(module.named_children())
        kinds = {type(item) for _, item in items}
        listed = isinstance(module, nn.ModuleList | nn.Sequential)
        if not listed or len(items) < 2 or len(kinds) != 1 or not any(items[0][1].children()):
            continue
        found |= {f"{path}.{name}" if path else name: item for name, item in items}
    return found


def _named(model: nn.Module, blocks: Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    by_path = dict(model.named_modules())
    names = {id(module): path for path, module in by_path.items()}
    found = {}
    for block in blocks:
        path = block if isinstance(block, str) else names.get(id(block))
        if path is None or path not in by_path or path == "":
            got = block if isinstance(block, str) else type(block).__name__
            raise ValueError(f"blocks: expected modules of the model or their names; got {got}")
        found[path] = by_path[path]
    for path in found:
        outer = next((o for o in found if path.startswith(f"{o}.")), None)
        if outer is not None:
            raise ValueError(f"blocks: expected blocks apart; {path} is within {outer}")
    return found
