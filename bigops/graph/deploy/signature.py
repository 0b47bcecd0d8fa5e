"""What a deployed module is called with and what it gives: names, structures, sizes.

The sizes of an exported graph are numbers, or symbols within a range that hold for all inputs.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

_COMPARED = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_ALLOWED = (
    ast.Expression,
    ast.Compare,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Constant,
    ast.Name,
    ast.Load,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
    ast.boolop,
    ast.Call,
)
_FUNCTIONS = {"min": min, "max": max}


class Expression:
    """A size, or a condition on sizes, of whole numbers and symbols: text that is no code."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError, RecursionError):
            raise ValueError(f"expected an expression of sizes; got {text[:80]!r}") from None
        for node in ast.walk(tree):
            allowed = isinstance(node, _ALLOWED)
            if isinstance(node, ast.Constant):
                allowed = type(node.value) in (int, float, bool)
            if isinstance(node, ast.BinOp):
                allowed = not isinstance(node.op, ast.Pow)
            if isinstance(node, ast.Call):
                allowed = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
            if not allowed:
                raise ValueError(f"expected an expression of sizes; got {text[:80]!r}")
        self._code = compile(tree, "<sizes>", "eval")

    def of(self, sizes: Mapping[str, int]) -> Any:
        """Its value where the symbols have these sizes."""
        return eval(self._code, {"__builtins__": {}, **_FUNCTIONS}, dict(sizes))


class Signature:
    """The inputs and outputs of a graph.

    Args:
        data: plain data, as `export` makes it:
            positional    names of the arguments that may come by position, in order
            arguments     [name, structure] of those that it is called with (None: one leaf)
            leaves        of each leaf in order {"dtype", "sizes"} or {"value"}: a constant
            ranges        lowest and highest (None: any) size of each symbol
            conditions    besides, by symbols and sizes ``name[dim]`` as ``name__dim``
            result        structure of what it gives (None: one tensor)
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.positional: list[str] = data["positional"]
        self.names: list[str] = [name for name, _ in data["arguments"]]
        self._known = set(self.names)
        self._specs = [None if s is None else _spec(s) for _, s in data["arguments"]]
        self._nested = any(spec is not None for spec in self._specs)
        self._result = None if data["result"] is None else _spec(data["result"])
        self._leaves = [_Leaf(self._name(at), leaf) for at, leaf in enumerate(data["leaves"])]
        self._ranges: dict[str, Any] = data["ranges"]
        self._conditions = [Expression(text) for text in data["conditions"]]

    # --- in ---------------------------------------------------------------------------------

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The leaves of a call in the order of the graph's inputs, checked.

        Raises:
            TypeError: an argument that is missing, that there is not, or of another structure or
                dtype.
            ValueError: a size, or a constant, that the model was not exported for.
        """
        values = self._bound(args, kwargs)
        if self._nested:
            values = self._flat(values)
        sizes: dict[str, int] = {}
        for leaf, value in zip(self._leaves, values, strict=True):
            leaf.check(value, sizes)
        for symbol, (low, high) in self._ranges.items():
            size = sizes.get(symbol, low)
            if size < low or (high is not None and size > high):
                self._refuse(symbol, size, low, high)
        if self._conditions:
            self._check_conditions(values, sizes)
        return values

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        if args:
            if len(args) > len(self.positional):
                raise TypeError(
                    f"expected at most {len(self.positional)} positions; got {len(args)}"
                )
            named = dict(zip(self.positional, args, strict=False))
            if twice := named.keys() & kwargs.keys():
                raise TypeError(f"{min(twice)}: expected one value; got a position and a keyword")
            kwargs = named | kwargs
        if kwargs.keys() != self._known:
            for name in self.names:
                if name not in kwargs:
                    raise TypeError(
                        f"{name}: expected, since the model was deployed with it; got none"
                    )
            extra = {n: v for n, v in kwargs.items() if n not in self._known and v is not None}
            if extra:
                raise TypeError(
                    f"{next(iter(extra))}: the model was deployed for "
                    f"{', '.join(self.names)} alone; deploy it with this argument to give it"
                )
        return [kwargs[name] for name in self.names]

    def _flat(self, values: Sequence[Any]) -> list[Any]:
        found: list[Any] = []
        for name, spec, value in zip(self.names, self._specs, values, strict=True):
            if spec is None:
                found.append(value)
                continue
            leaves, got = pytree.tree_flatten(value)
            if len(leaves) != spec.num_leaves or got != spec:
                raise TypeError(f"{name}: expected {_words(spec)}; got {_words(got)}")
            found += leaves
        return found

    def _name(self, at: int) -> str:
        for name, spec in zip(self.names, self._specs, strict=True):
            count = 1 if spec is None else spec.num_leaves
            if at < count:
                return name if spec is None else f"{name} (leaf {at})"
            at -= count
        raise IndexError(at)

    def _refuse(self, symbol: str, size: int, low: int, high: int | None) -> None:
        places = (
            f"{leaf.name}: dimension {dim}"
            for leaf in self._leaves
            for dim, expected in enumerate(leaf.sizes)
            if expected == symbol
        )
        most = "" if high is None else f" to {high}"
        raise ValueError(
            f"{next(places, symbol)}: expected a size from {low}{most}, for which the model was "
            f"exported; got {size}"
        )

    def _check_conditions(self, values: Sequence[Any], sizes: dict[str, int]) -> None:
        for leaf, value in zip(self._leaves, values, strict=True):
            if isinstance(value, Tensor):
                sizes |= zip(leaf.keys, value.shape, strict=True)
        for condition in self._conditions:
            if not condition.of(sizes):
                raise ValueError(
                    f"sizes: expected {condition.text.replace('__', ' size ')}, for which the "
                    "model was exported; got others"
                )

    # --- out --------------------------------------------------------------------------------

    def result(self, leaves: Sequence[Any]) -> Any:
        """The leaves that the graph gave in the structure that the model gives."""
        if self._result is None:
            return leaves[0]
        return pytree.tree_unflatten(leaves, self._result)


class _Leaf:
    """One input of the graph: a tensor's dtype and sizes, or a constant."""

    def __init__(self, name: str, data: Mapping[str, Any]) -> None:
        self.name = name
        self.constant = "value" in data
        self.value = data.get("value")
        self.sizes: list[int | str] = data.get("sizes", [])
        self.dtype = None if self.constant else getattr(torch, data["dtype"])
        plain = (s for s in self.sizes if isinstance(s, str) and not s.isidentifier())
        self._expressions = {text: Expression(text) for text in plain}
        self.keys = [f"{name}__{dim}" for dim in range(len(self.sizes))]  # in conditions

    def check(self, value: Any, sizes: dict[str, int]) -> None:
        """Raise unless a value fits; sizes of new symbols are noted."""
        name = self.name
        if self.constant:
            if type(value) is not type(self.value) or value != self.value:
                raise ValueError(
                    f"{name}: expected {self.value!r}, which the model was deployed with; got "
                    f"{value!r}"
                )
            return
        if not isinstance(value, Tensor) or value.dtype != self.dtype:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a tensor of {self.dtype}; got {got}")
        if value.dim() != len(self.sizes):
            raise ValueError(f"{name}: expected shape {self.sizes}; got {list(value.shape)}")
        for expected, size in zip(self.sizes, value.shape, strict=True):
            if isinstance(expected, str):
                if expected in self._expressions:
                    expected = self._expressions[expected].of(sizes)
                else:
                    expected = sizes.setdefault(expected, size)
            if expected != size:
                raise ValueError(
                    f"{name}: expected shape {self.sizes} with {sizes}; got {list(value.shape)}"
                )


# --- of an exported program ------------------------------------------------------------------


def conditions(guards: Sequence[str]) -> list[str]:
    """Guards of torch.export as conditions on sizes.

    Raises:
        ValueError: a guard on something else.
    """
    return [Expression(_COMPARED.sub(r"\1__\2", guard)).text for guard in guards]


def spec_data(spec: pytree.TreeSpec) -> Any:
    """A structure as plain data, or None of one leaf."""
    return None if spec.is_leaf() else json.loads(pytree.treespec_dumps(spec))


def _spec(data: Any) -> pytree.TreeSpec:
    return pytree.treespec_loads(json.dumps([data[0], _of_known(data[1])]))


def _of_known(node: Any) -> Any:
    """Structures whose class is not there (of a package that is not imported) become dicts."""
    if not isinstance(node, dict):
        return node
    children = [_of_known(child) for child in node["children_spec"]]
    name = node["type"]
    if name is not None and name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        return {"type": "builtins.dict", "context": node["context"], "children_spec": children}
    return {**node, "children_spec": children}


def _words(spec: pytree.TreeSpec) -> str:
    return "a leaf" if spec.is_leaf() else f"a {spec.type.__name__} of {spec.num_leaves} leaves"
