"""Verbs, files and the command line ask layers what they can, not of which class they are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "bigops"
ROOMS = ("compress", "cli", "graph")
MOST = 5


def classes(*rooms: str) -> set[str]:
    """Names of the classes that rooms define."""
    files = (file for room in rooms for file in (ROOT / room).rglob("*.py"))
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return {node.name for node in nodes if isinstance(node, ast.ClassDef)}


def type_tests(source: str, ours: set[str]) -> Iterator[str]:
    """Where the class of a value decides, unless it is held against classes that are not ours.

    ``isinstance`` and ``issubclass`` of our classes; ``type(x)`` compared with a name, which may
    stand for them; ``type(x)`` as the key of a table that is a constant.
    """

    def is_ours(node: ast.AST) -> bool:
        return any(isinstance(n, ast.Name) and n.id in ours for n in ast.walk(node))

    def is_type(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func) == "type" and bool(node.args)

    builtin = {"CONTAINERS", "tuple", "int", "Tensor", "_FUSED_AWAY"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found = name in ("isinstance", "issubclass") and is_ours(node.args[1])
            found = found or (name.endswith(".get") and any(map(is_type, node.args)))
        elif isinstance(node, ast.Compare) and is_type(node.left):
            (right,) = node.comparators
            found = isinstance(right, ast.Name) and right.id not in builtin
            found = found or (not isinstance(right, ast.Name) and is_ours(right))
        else:
            found = isinstance(node, ast.Subscript) and is_type(node.slice)
        if found:
            yield ast.unparse(node)


def test_few_places_ask_for_the_class_of_a_layer_or_a_format() -> None:
    ours = classes("nn", "formats")
    found = [
        f"{file.relative_to(ROOT)}: {text}"
        for room in ROOMS
        for file in sorted((ROOT / room).rglob("*.py"))
        for text in type_tests(file.read_text(), ours)
    ]
    found.remove("graph/dataflow.py: _NAMES.get(type(module))")  # activations of torch
    assert len(found) <= MOST, found


@pytest.mark.parametrize(
    "planted",
    [
        "isinstance(layer, nn.Linear | QuantLinear)",
        "isinstance(layer, (Linear, nn.Linear))",
        "issubclass(kind.cls, CompressedLinear)",
        "type(layer) is SparseLinear",
        "type(layer) in (nn.Linear, Linear)",
        "type(layer) in exact",
        "_OPS.get(type(layer))",
        "_PACKED[type(layer)](layer)",
    ],
)
def test_it_is_found(planted: str) -> None:
    assert list(type_tests(planted, classes("nn", "formats")))


@pytest.mark.parametrize("fine", ["isinstance(layer, nn.Linear)", "type(value) in CONTAINERS"])
def test_what_is_not_ours_is_fine(fine: str) -> None:
    assert not list(type_tests(fine, classes("nn", "formats")))
