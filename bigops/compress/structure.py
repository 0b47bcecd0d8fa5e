"""The structure of a model as plain data, and back: what the header of a saved file holds.

A node is ``{"kind": .., "args": {..}, "children": {name: node}}``. Kinds are a closed list: a file
can name nothing else, so loading one runs no foreign code. A module of another class is written as
``{"kind": "other", "class": .., "children": ..}``; its children are described all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from bigops.graph.carry import hook_reason
from bigops.graph.deploy.deployed import Deployed
from bigops.nn import LAYERS, fields, stored_state
from bigops.nn.attention import MultiheadAttention
from bigops.nn.fields import FLAG, INT, NUMBER, SIZE, SIZES, Field, one_of, optional
from bigops.nn.layer import Layer, layer_of

MAX_DEPTH = 64
OTHER = "other"


class StructureError(ValueError):
    """The structure does not fit; the message says where, what was expected and what came."""


class Kind(NamedTuple):
    """How modules of one class are described and made."""

    cls: type[nn.Module]
    describe: Callable[[Any], dict[str, Any]]
    make: Callable[[dict[str, Any]], nn.Module]
    fields: dict[str, Field]
    container: bool = False
    # Layers of its own that a verb may have swapped, with the kind that the constructor makes:
    # children of the node where they are of another.
    parts: Mapping[str, str] = {}
    compressed: bool = False


def _plain(cls: type[nn.Module], **fields: Field) -> Kind:
    """A class whose constructor takes the attributes ``fields`` and no device."""
    return Kind(cls, lambda m: {n: getattr(m, n) for n in fields}, lambda args: cls(**args), fields)


def _on_meta(
    cls: type[nn.Module],
    describe: Callable[[Any], dict[str, Any]],
    fields: dict[str, Field],
) -> Kind:
    """A class whose constructor takes a device; on "meta" it draws no random number."""
    return Kind(cls, describe, lambda args: cls(**args, device="meta"), fields)


def _ours(cls: type[Layer]) -> Kind:
    """A layer of this package."""
    return Kind(
        cls,
        lambda layer: layer.arguments(),
        cls.from_arguments,
        cls.FIELDS,
        parts=cls.parts,
        compressed=cls.compressed,
    )


def _linear(module: nn.Linear) -> dict[str, Any]:
    return {
        "in_features": module.in_features,
        "out_features": module.out_features,
        "bias": module.bias is not None,
    }


def _layer_norm(module: nn.LayerNorm) -> dict[str, Any]:
    return {
        "normalized_shape": list(module.normalized_shape),
        "eps": module.eps,
        "elementwise_affine": module.elementwise_affine,
        "bias": module.bias is not None,
    }


_EMBEDDING = {
    "num_embeddings": SIZE,
    "embedding_dim": SIZE,
    "padding_idx": optional(INT),
    "max_norm": optional(NUMBER),
    "norm_type": NUMBER,
    "scale_grad_by_freq": FLAG,
    "sparse": FLAG,
}

_CONTAINERS: dict[str, Kind] = {
    name: Kind(cls, lambda m: {}, lambda args, cls=cls: cls(**args), {}, container=True)  # type: ignore[misc]
    for name, cls in (
        ("Sequential", nn.Sequential),
        ("ModuleList", nn.ModuleList),
        ("ModuleDict", nn.ModuleDict),
    )
}

KINDS: dict[str, Kind] = {
    **_CONTAINERS,
    "Identity": _plain(nn.Identity),
    "ReLU": _plain(nn.ReLU, inplace=FLAG),
    "GELU": _plain(nn.GELU, approximate=one_of("none", "tanh")),
    "SiLU": _plain(nn.SiLU, inplace=FLAG),
    "Sigmoid": _plain(nn.Sigmoid),
    "Tanh": _plain(nn.Tanh),
    "Softmax": _plain(nn.Softmax, dim=optional(INT)),
    "LogSoftmax": _plain(nn.LogSoftmax, dim=optional(INT)),
    "Flatten": _plain(nn.Flatten, start_dim=INT, end_dim=INT),
    "Dropout": _plain(nn.Dropout, p=NUMBER, inplace=FLAG),
    "LayerNorm": _on_meta(
        nn.LayerNorm,
        _layer_norm,
        {"normalized_shape": SIZES, "eps": NUMBER, "elementwise_affine": FLAG, "bias": FLAG},
    ),
    "Embedding": _on_meta(
        nn.Embedding, lambda m: {n: getattr(m, n) for n in _EMBEDDING}, _EMBEDDING
    ),
    "bigops.MultiheadAttention": Kind(
        MultiheadAttention,
        lambda m: m.arguments(),
        MultiheadAttention.from_arguments,
        MultiheadAttention.FIELDS,
        parts=MultiheadAttention.parts,
    ),
    "torch.Linear": _on_meta(nn.Linear, _linear, fields.LINEAR),
    **{f"bigops.{cls.__name__}": _ours(cls) for cls in LAYERS},
    "bigops.Deployed": Kind(
        Deployed, lambda m: m.arguments(), Deployed.from_arguments, Deployed.FIELDS
    ),
}
_NAMES = {kind.cls: name for name, kind in KINDS.items()}
# What `fuse_` leaves where an activation was: see bigops/graph/fuse.py.
_FUSED_AWAY = (nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh)


def _name_of(model: nn.Module) -> str | None:
    """The kind of a module of just that class."""
    return _NAMES.get(type(model))


def describe(model: nn.Module) -> dict[str, Any]:
    """The tree of a model as plain data."""
    name = _name_of(model)
    node: dict[str, Any] = {"kind": OTHER, "class": _class_name(model)}
    if name is not None:
        node = {"kind": name, "args": KINDS[name].describe(model)}
        if reason := hook_reason(model):
            node["attached"] = reason
    inner = {n: m for n, m in model._modules.items() if m is not None}
    if name is not None and not KINDS[name].container:
        parts = KINDS[name].parts.items()
        inner = {n: inner[n] for n, made in parts if _name_of(inner[n]) != made}
    if inner:
        node["children"] = {n: describe(m) for n, m in inner.items()}
    return node


def build(node: Any, path: str = "", depth: int = 0) -> nn.Module:
    """The module that ``node`` describes, its tensors on "meta".

    Raises:
        StructureError: a node that is malformed, or of a class that is not in the list.
    """
    kind = _kind(node, path, depth)
    if kind is None:
        raise StructureError(
            f"{_where(path)} is a {node.get('class')!r}, which the file cannot build alone: pass "
            "load(path, model=...) a model of that class"
        )
    if "attached" in node:
        raise StructureError(
            f"{_where(path)} cannot be built from the file alone ({node['attached']}): pass "
            "load(path, model=...)"
        )
    return _whole(node, path, depth)


def _whole(node: Mapping[str, Any], path: str, depth: int) -> nn.Module:
    module = _make(node, path)
    for name, child in node.get("children", {}).items():
        try:
            module.add_module(name, build(child, _join(path, name), depth + 1))
        except (KeyError, TypeError) as error:
            raise StructureError(f"{_where(path)}: bad child name {name!r} ({error})") from None
    return module


def replacements(
    node: Any, model: nn.Module, path: str = "", depth: int = 0, free: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """What to put into ``model`` so that it is as ``node`` says, by path; tensors on "meta".

    The code of a class that is not in the list may exchange its modules while it runs. What lies
    in one may therefore be of another kind than in the file, and becomes what the file has; and
    where it is of another such class, children may be in one of the two alone: that both have the
    same tensors is for the caller to see.

    Args:
        free: whether the module lies in one of such a class.

    Raises:
        StructureError: ``model`` has other children, sizes or settings than the node.
    """
    kind = _kind(node, path, depth)
    mine = {name for name, child in model._modules.items() if child is not None}
    name = _name_of(model)
    old = {} if name is None else KINDS[name].describe(model)
    same = kind is not None and name == node["kind"] and old == node["args"]
    if same and kind is not None and kind.parts and node.get("children"):
        mine = set(node["children"])  # the rest of it is as the file has it
    elif kind is not None and not kind.container:
        if node["kind"].startswith("bigops."):
            for size in ("in_features", "out_features", "num_embeddings", "embedding_dim"):
                got = getattr(model, size, None)
                if got is not None and got != node["args"].get(size):
                    raise StructureError(
                        f"{_where(path)}: the file holds a layer of {size} "
                        f"{node['args'].get(size)}; the model's has {got}"
                    )
            yield path, _whole(node, path, depth)
        elif kind.cls is nn.Identity and type(model) in _FUSED_AWAY:
            if type(model) is not nn.Identity:
                yield path, nn.Identity()
        elif name != node["kind"] and free and not isinstance(model, LazyModuleMixin):
            yield path, _whole(node, path, depth)
        elif name != node["kind"]:
            raise StructureError(
                f"{_where(path)}: the file holds a {node['kind']}; the model a {_class_name(model)}"
            )
        elif old != node["args"]:
            raise StructureError(
                f"{_where(path)}: the file holds {node['kind']} with {node['args']}; the model "
                f"has {old}"
            )
        return
    theirs = set(node.get("children", {}))
    other = kind is None and node.get("class") != _class_name(model)
    if mine != theirs and not other:
        raise StructureError(
            f"{_where(path)}: the file has the children {sorted(theirs)}; the model {sorted(mine)}"
        )
    for name, child in node.get("children", {}).items():
        below, inside = model._modules.get(name), _join(path, name)
        if below is not None:
            yield from replacements(child, below, inside, depth + 1, free or kind is None)


def compressed(node: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Layer]]:
    """The compressed layers that a tree describes, by path; tensors on "meta".

    Raises:
        StructureError: a node that is malformed.
    """
    kind = _kind(node, path, depth)
    if kind is not None and kind.compressed:
        layer = layer_of(_make(node, path))
        assert layer is not None
        yield path, layer
    for name, child in node.get("children", {}).items():
        yield from compressed(child, _join(path, name), depth + 1)


def _kind(node: Any, path: str, depth: int) -> Kind | None:
    """The node's kind, None for a class that is not in the list."""
    if depth > MAX_DEPTH:
        raise StructureError(f"{_where(path)}: nested deeper than {MAX_DEPTH}")
    shaped = isinstance(node, dict) and isinstance(node.get("children", {}), dict)
    if not shaped or not isinstance(node.get("kind"), str):
        raise StructureError(f"{_where(path)}: expected a node with a kind; got {str(node)[:80]}")
    if node["kind"] == OTHER:
        return None
    kind = KINDS.get(node["kind"])
    if kind is None:
        raise StructureError(
            f"{_where(path)}: expected one of {', '.join(KINDS)}; got {node['kind']!r}"
        )
    if not isinstance(node.get("args"), dict):
        raise StructureError(
            f"{_where(path)}: expected arguments; got {str(node.get('args'))[:80]}"
        )
    if wrong := fields.misfit(kind.fields, node["args"]):
        raise StructureError(f"{_where(path)}: a {node['kind']} cannot be made: {wrong}")
    if not kind.container and not set(node.get("children", {})) <= set(kind.parts):
        which = f"children but {', '.join(kind.parts)}" if kind.parts else "children"
        raise StructureError(f"{_where(path)}: a {node['kind']} has no {which}")
    return kind


def _make(node: Mapping[str, Any], path: str) -> nn.Module:
    try:
        return KINDS[node["kind"]].make(dict(node["args"]))
    except MemoryError:
        raise
    except Exception as error:  # torch's constructors assert, too
        raise StructureError(
            f"{_where(path)}: {node['kind']} cannot be made with {str(node['args'])[:120]} "
            f"({type(error).__name__}: {error})"
        ) from None


def storage_keys(model: nn.Module) -> set[str]:
    """Names in the state_dict whose sizes are free: the storage of frozen compressed layers.

    Of packed layers the state_dict has the matrices, which have sizes of their own.
    """
    return {
        _join(path, name)
        for path, module in model.named_modules()
        if (layer := layer_of(module)) is not None and layer.frozen
        for name in layer.storage_names
    }


def in_todays_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, which an older version may have written, by the names of today."""
    for path, module in model.named_modules():
        if (layer := layer_of(module)) is not None:
            tensors = stored_state.in_todays_names(
                tensors, f"{path}." if path else "", layer.older_names
            )
    return tensors


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _where(path: str) -> str:
    return f"module {path!r}" if path else "the model"
