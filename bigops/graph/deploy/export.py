"""deploy: a model as one graph for inference, with everything between its products fused."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from bigops.graph.deploy import passes, signature
from bigops.graph.deploy.deployed import Deployed
from bigops.graph.deploy.passes.rewrite import written_in
from bigops.graph.deploy.signature import Signature
from bigops.graph.sites import as_call, evaluating
from bigops.nn.layer import layer_of
from bigops.nn.stored_parameter import stored_in

# What is too far, of the norm of a result: sums in another order are not, 16 bits through many
# layers. Where x is rounded to u8, a last bit may become a step of 1/255, layer by layer: as far as
# the rounding itself is from the float model (6% on MiniLM). A wrong graph is 100% away.
_FAR, _FAR_IN_U8 = 0.05, 0.25
Dynamic = bool | Mapping[str, Any]


def deploy(model: nn.Module, example_inputs: Any, dynamic: Dynamic = True) -> Deployed:
    """Make of ``model`` a module for inference on the CPU that is a graph of fused ops.

    The model is exported (`torch.export`), and passes rewrite its graph: what follows from weights
    alone is computed, dense weights are packed, layers that read the same x merged, activations and
    sums moved into the products before them, attention and norms replaced by ops of this package.
    Compressed layers stay what they are.

    Args:
        model: in any state but training of what it holds: layers that are to be compressed are
            frozen. It is not changed, and no tensor of the result is written when it is.
        example_inputs: what the model is called with: x, a tuple of positions or a mapping of
            keywords; a list is an x. The result takes these arguments, by position or keyword, and
            no others.
        dynamic: True: sizes of the inputs that the model lets vary may vary, a batch of one
            included. False: the sizes of ``example_inputs`` alone. Or a mapping by argument of
            what `torch.export.export` takes as ``dynamic_shapes``.

    Returns:
        A `Deployed` module. ``counts`` says what the passes did, ``calls()`` what one forward
        calls; `bigops.save` writes it to a file that `bigops.load` reads without the model's code.

    Raises:
        TypeError: ``model`` is no module, or ``example_inputs`` do not fit its forward.
        ValueError: a layer that is not frozen, a weight that is not on the CPU, a guard of the
            export that a file cannot hold.
        RuntimeError: the model cannot be exported (the reason of torch.export), or the graph does
            not give what the model gives on ``example_inputs``.

    Source: torch.export, https://docs.pytorch.org/docs/stable/export.html.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    _check(model)
    named, positional = _arguments(model, example_inputs)
    with evaluating(model), torch.no_grad():
        exported, given = _export(model, named, dynamic)
        deployed = _of(exported, given, positional)
        state = {name: deployed.graph.get_buffer(name) for name in written_in(deployed.graph)}
        before = {name: buffer.clone() for name, buffer in state.items()}
        difference = _difference(deployed, model, named)
        if difference is None:
            _try_sizes_of_one(deployed, model, given)
        for name, buffer in state.items():  # a cache that the graph writes is as the model's was
            buffer.copy_(before[name])
    if difference is not None:
        raise RuntimeError(f"model: expected the graph to give what the model gives; {difference}")
    return deployed


# --- before ----------------------------------------------------------------------------------


def _check(model: nn.Module) -> None:
    for path, module in model.named_modules():
        layer = layer_of(module)
        if layer is not None and layer.freezes and not getattr(layer, "frozen", True):
            if layer.unpacks:
                continue  # a packed layer that is thawed is a dense one
            raise ValueError(
                f"{path}: expected a frozen layer (bigops.freeze_); got one in recovery, whose "
                "weight is rounded in every call"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: expected a tensor on the CPU; got one on {tensor.device}")


def _arguments(model: nn.Module, example_inputs: Any) -> tuple[dict[str, Any], list[str]]:
    """The arguments of the example by name, and the names that may come by position."""
    args, kwargs = as_call(example_inputs)
    found = inspect.signature(model.forward)
    kinds = inspect.Parameter
    positional = [
        name
        for name, p in found.parameters.items()
        if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    try:
        found.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"example_inputs: expected the arguments of forward; {error}") from None
    if len(args) > len(positional) or any(
        p.kind is kinds.POSITIONAL_ONLY for p in found.parameters.values()
    ):
        raise TypeError(
            "example_inputs: expected arguments that have names; forward takes *args or "
            "arguments by position only: wrap the model in a module whose forward names them"
        )
    named = dict(zip(positional, args, strict=False)) | kwargs
    return named, positional


def _export(
    model: nn.Module, named: dict[str, Any], dynamic: Dynamic
) -> tuple[ExportedProgram, dict[str, Any]]:
    """The exported program and the arguments that it was made with."""
    tries = [named]
    if dynamic is True and (grown := _batch_of_two(named)) is not None:
        tries.insert(0, grown)  # torch.export takes a size of one for a constant
    for last, given in enumerate(tries, 1 - len(tries)):
        shapes = _shapes(given, dynamic)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.export.export(model, (), given, dynamic_shapes=shapes), given
        except Exception as error:
            if last == 0:
                raise RuntimeError(
                    f"model: expected one that torch.export takes; {type(error).__name__}: {error}"
                ) from error
    raise AssertionError


def _batch_of_two(named: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments with each batch of one twice, where all tensors have a batch of one."""
    leaves, spec = pytree.tree_flatten(named)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return None
    doubled = [torch.cat([x, x]) if isinstance(x, Tensor) else x for x in leaves]
    grown: dict[str, Any] = pytree.tree_unflatten(doubled, spec)
    return grown


def _shapes(named: dict[str, Any], dynamic: Dynamic) -> Any:
    if isinstance(dynamic, Mapping):
        if unknown := dynamic.keys() - named.keys():
            raise TypeError(f"dynamic: expected names of arguments; got {min(unknown)!r}")
        return {name: dynamic.get(name) for name in named}
    if not dynamic:
        return None

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        return {dim: Dim.AUTO for dim, size in enumerate(leaf.shape) if size > 1}

    return {name: pytree.tree_map(of, value) for name, value in named.items()}


# --- the graph -------------------------------------------------------------------------------


def _of(exported: ExportedProgram, given: dict[str, Any], positional: list[str]) -> Deployed:
    module = exported.module()
    result = module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module":  # what checks the inputs: a signature does here
            graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())
    for node in graph.nodes:
        if node.op == "output" and not isinstance(node.args[0], list | tuple):
            node.args = ((node.args[0],),)
    counts = passes.run(module, owns=True)
    data = _signature(exported, module, given, positional, result)
    theirs = {
        t.untyped_storage().data_ptr()
        for t in (*exported.state_dict.values(), *exported.constants.values())
        if isinstance(t, Tensor) and stored_in(t) is None
    }
    return Deployed(_flat(module, theirs), Signature(data), counts)


def _signature(
    exported: ExportedProgram,
    module: fx.GraphModule,
    given: dict[str, Any],
    positional: list[str],
    result: pytree.TreeSpec,
) -> dict[str, Any]:
    leaves: list[dict[str, Any]] = []
    symbols: set[str] = set()
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta["val"]
        if isinstance(value, Tensor):
            sizes = [size if isinstance(size, int) else str(size) for size in value.shape]
            symbols |= {s for size in value.shape if not isinstance(size, int) for s in _free(size)}
            leaves.append({"dtype": str(value.dtype).removeprefix("torch."), "sizes": sizes})
        elif value is None or isinstance(value, bool | int | float | str):
            leaves.append({"value": value})
        else:
            raise ValueError(
                f"{node.name}: expected tensors and constants; got {type(value).__name__}"
            )
    arguments = [[n, signature.spec_data(pytree.tree_flatten(v)[1])] for n, v in given.items()]
    return {
        "positional": positional,
        "arguments": arguments,
        "leaves": leaves,
        "ranges": _ranges(exported, symbols),
        "conditions": signature.conditions(getattr(exported, "_guards_code", None) or []),
        "result": signature.spec_data(result),
    }


def _free(size: Any) -> set[str]:
    return {str(symbol) for symbol in size.node.expr.free_symbols}


def _ranges(exported: ExportedProgram, symbols: set[str]) -> dict[str, list[int | None]]:
    found: dict[str, list[int | None]] = {}
    for symbol, bounds in exported.range_constraints.items():
        if str(symbol) in symbols:
            # torch.export assumes 2 and more of every size; 0 and 1 are tried below
            low = int(bounds.lower) if bounds.lower > 2 else 0
            high = int(bounds.upper) if bounds.upper.is_finite and bounds.upper < 2**31 else None
            found[str(symbol)] = [low, high]
    return found


def _flat(module: fx.GraphModule, theirs: set[int]) -> fx.GraphModule:
    """The graph with each of its tensors as a buffer of its own, and nothing else.

    ``theirs``: the memory of the model's own tensors, which somebody may write later; what is
    stored packed nobody writes, and what a pass has made nobody else has.
    """
    root = nn.Module()
    names: dict[str, str] = {}
    copies: dict[tuple[int, ...], Tensor] = {}
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        target = str(node.target)
        if target not in names:
            owner: Any = module
            for part in target.split("."):
                owner = getattr(owner, part)
            stored = stored_in(owner)
            own = owner.detach() if stored is None else stored
            if own.untyped_storage().data_ptr() in theirs:
                key = (own.data_ptr(), *own.shape, *own.stride())
                own = copies.setdefault(key, own.clone())  # tied ones stay one
            base = free = "_" * (not target[0].isalpha()) + target.replace(".", "_")
            while hasattr(root, free):
                free = f"{base}_{len(names)}"
            root.register_buffer(free, own)
            names[target] = free
        node.target = names[target]
    return fx.GraphModule(root, module.graph)


# --- behind ----------------------------------------------------------------------------------


def _difference(deployed: Deployed, model: nn.Module, named: dict[str, Any]) -> str | None:
    """What a graph gives otherwise than the model, or None."""
    far = _FAR_IN_U8 if any(_rounds(module) for module in model.modules()) else _FAR
    wanted, spec = pytree.tree_flatten(model(**copy.deepcopy(named)))
    found, its = pytree.tree_flatten(deployed(**copy.deepcopy(named)))
    if len(wanted) != len(found):
        return f"it gives {spec}; got {its}"
    for a, b in zip(wanted, found, strict=True):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"it gives {a.dtype} {list(a.shape)}; got {b.dtype} {list(b.shape)}"
        error = (a.double() - b.double()).nan_to_num(0.0).norm()
        size = a.double().nan_to_num(0.0).norm()
        if error > far * size or not torch.equal(a.isnan(), b.isnan()):
            return f"a result of {list(a.shape)} is {float(error / size):.1%} of its norm away"
    return None


def _rounds(module: nn.Module) -> bool:
    """Whether a layer quantises its x."""
    storage = getattr(layer_of(module), "storage", None)
    return storage is not None and storage().rounds


def _try_sizes_of_one(deployed: Deployed, model: nn.Module, given: dict[str, Any]) -> None:
    """Let a size be 1, or 0, where the graph then gives what the model gives.

    torch.export asks of no branch what it does with a size of one. A batch is a symbol in each
    input: those that cannot be 1 alone, for the others to be broadcast to, may be 1 together.
    """
    data: Any = deployed.signature.data
    sizes = _sizes(data["leaves"], pytree.tree_leaves(given))
    small = [symbol for symbol, (low, _) in data["ranges"].items() if low == 0]
    alone = {symbol for symbol in small if _holds(deployed, model, given, {symbol})}
    for symbol in small:
        together = {other for other in small if sizes[other] == sizes[symbol]}
        if symbol in alone:
            continue
        if together == {symbol} or not _holds(deployed, model, given, together):
            data["ranges"][symbol][0] = 2
        else:
            data["conditions"] += [f"{symbol} == {other}" for other in sorted(together - {symbol})]
    deployed.signature = Signature(data)


def _sizes(leaves: list[dict[str, Any]], values: list[Any]) -> dict[Any, int]:
    """The example's size of each symbol."""
    found: dict[Any, int] = {}
    for of, value in zip(leaves, values, strict=True):
        if isinstance(value, Tensor):
            found |= dict(zip(of["sizes"], value.shape, strict=True))
    return found


def _holds(deployed: Deployed, model: nn.Module, given: dict[str, Any], ones: set[str]) -> bool:
    """Whether the graph gives what the model gives where these symbols are 1."""
    leaves, spec = pytree.tree_flatten(given)
    cut = [
        _one(leaf, [dim for dim, size in enumerate(of.get("sizes", ())) if size in ones])
        for leaf, of in zip(leaves, deployed.signature.data["leaves"], strict=True)
    ]
    try:
        return _difference(deployed, model, pytree.tree_unflatten(cut, spec)) is None
    except Exception:  # whatever either of them raises: it is not for this size
        return False


def _one(leaf: Any, dims: list[int]) -> Any:
    for dim in dims:
        leaf = leaf.narrow(dim, 0, 1)
    return leaf
