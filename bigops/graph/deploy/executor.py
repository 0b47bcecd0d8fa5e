"""A deployed graph without Python between its calls: runs of nodes become programs in C++.

A call by Python costs 5 us, where a layer of a small model takes 20, and Python runs one thread at
a time. What torch's stable ABI cannot pass on (a `Scalar`, a device) stays a node of the graph.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch._ops import OpOverload

from bigops.backend import machine
from bigops.graph.deploy.passes.rewrite import VIEWS, aten
from bigops.ops.library import define

LEAST = 4
"""Nodes of a program: a call of one costs as much as some of its calls do."""

_execute = define("execute(int program, Tensor[] inputs) -> Tensor[]")
_bind = define("bind_program(int program, int[] slots, Tensor[] tensors) -> ()")
_INTEGERS = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "/"}
_SIZE = aten.sym_size.int
_INTEGER_TYPES = ("int", "SymInt")
_READERS = ("size", "transpose", "slice", "reshape")  # steps (output, tensor, ...)
_END = (1 << 63) - 1


def with_programs(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with each run of calls that C++ can make as one node; it shares the tensors.

    The programs hold the module's tensors as they are now: whoever exchanges one makes them anew.
    """
    made = fx.GraphModule(graph, _copied(graph.graph))
    if machine.extension is None:
        return made
    for run in list(_runs(made.graph)):
        _replace(made, run)
    made.graph.eliminate_dead_code(lambda node: not (node.op == "get_attr" or _is_integer(node)))
    made.recompile()
    return made


def _copied(graph: fx.Graph) -> fx.Graph:
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    return made


# --- which nodes ------------------------------------------------------------------------------


def _runs(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Neighbours that C++ can call; what is an integer belongs to whoever reads it."""
    run: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "get_attr" or _is_integer(node):
            continue
        if _is_served(node):
            run.append(node)
            continue
        if len(run) >= LEAST:
            yield run
        run = []


def _is_integer(node: fx.Node) -> bool:
    """Whether a node is an integer that a program can compute itself, of tensors and of others."""
    if node.op != "call_function":
        return False
    if node.target is _SIZE:
        return isinstance(node.args[1], int)
    return node.target in _INTEGERS and all(
        type(a) is int or (isinstance(a, fx.Node) and _is_integer(a)) for a in node.args
    )


def _is_served(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and _is_served(source)
    if not isinstance(node.target, OpOverload):
        return False
    results = [str(r.type) for r in node.target._schema.returns]
    if not results or set(results) != {"Tensor"}:
        return False
    if len(results) > 1 and any(user.target is not operator.getitem for user in node.users):
        return False
    try:
        return all(_argument(kind, given, None) is not None for kind, given in _arguments(node))
    except KeyError:
        return False


def _arguments(node: fx.Node) -> list[tuple[str, Any]]:
    """Each argument of the schema: its type, and what the call gives or the default.

    Raises:
        KeyError: a keyword that has neither.
    """
    schema = node.target._schema  # type: ignore[union-attr]
    found = []
    for at, argument in enumerate(schema.arguments):
        if at < len(node.args):
            given = node.args[at]
        elif argument.name in node.kwargs:
            given = node.kwargs[argument.name]
        elif argument.has_default_value():
            given = argument.default_value
        else:
            raise KeyError(argument.name)
        found.append((str(argument.real_type), given))
    return found


def _argument(kind: str, given: Any, program: _Program | None) -> tuple[str, Any] | None:
    """An argument as csrc/cpu/executor.h has it, or None of what it has no kind for.

    Without a program the slots are all 0: only whether there is one is asked.
    """

    def slot(node: fx.Node) -> int:
        return 0 if program is None else program.slot(node)

    def integer(value: Any) -> tuple[bool, int] | None:
        if type(value) is int:
            return False, value
        return (True, slot(value)) if isinstance(value, fx.Node) and _is_integer(value) else None

    optional = kind.startswith("Optional[")
    kind = kind.removeprefix("Optional[").removesuffix("]") if optional else kind
    if given is None:
        return ("N", 0) if optional else None
    if kind == "Tensor":
        if not isinstance(given, fx.Node) or _is_integer(given):
            return None
        return ("O" if optional else "T", slot(given))
    if kind in _INTEGER_TYPES:
        found = integer(given)
        if found is None or (optional and found[0]):
            return None
        return ("I" if optional else "s" if found[0] else "i", found[1])
    if kind == "float" and type(given) in (float, int):
        return ("F" if optional else "f", float(given))
    if kind == "bool" and isinstance(given, bool) and not optional:
        return ("b", int(given))
    if optional or not isinstance(given, list | tuple):
        return None
    if kind in ("List[int]", "List[SymInt]"):
        items = [integer(value) for value in given]
        return None if None in items else ("L", items)
    if kind in ("List[Tensor]", "List[Optional[Tensor]]"):
        if not all(isinstance(v, fx.Node) or (v is None and "Optional" in kind) for v in given):
            return None
        slots = [(False, -1 if value is None else slot(value)) for value in given]
        return ("B" if "Optional" in kind else "A", slots)
    return None


# --- a program of them -------------------------------------------------------------------------


@dataclass
class _Program:
    """What a run becomes: its steps, and what it takes from outside."""

    run: set[fx.Node]
    slots: dict[fx.Node, int] = field(default_factory=dict)
    inputs: list[fx.Node] = field(default_factory=list)
    bound: list[fx.Node] = field(default_factory=list)
    steps: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def slot(self, node: fx.Node) -> int:
        """Where the value of a node lies: of one outside the run, from the start."""
        found = self.slots.get(node)
        if found is None:
            found = self.slots[node] = len(self.slots)
            if _is_integer(node):
                self._integer(node, found)
            elif node not in self.run:
                (self.bound if node.op == "get_attr" else self.inputs).append(node)
        return found

    def _integer(self, node: fx.Node, to: int) -> None:
        if node.target is _SIZE:
            tensor, dim = node.args
            self.steps.append(("size", (to, self.slot(tensor), dim)))  # type: ignore[arg-type]
            return
        a, b = ((False, v) if type(v) is int else (True, self.slot(v)) for v in node.args)  # type: ignore[arg-type]
        self.steps.append(("arithmetic", (to, _INTEGERS[node.target], a, b)))  # type: ignore[index]

    def add(self, node: fx.Node) -> None:
        """The step of a node: a view where it is one whose dimensions are known, or a call."""
        if node.target in (aten.transpose.int, aten.slice.Tensor, *VIEWS):
            view = self._view(node)
            if view is not None:
                name, source, *given = view
                source = self.slot(source)
                self.steps.append((name, (self.slot(node), source, *given)))
                return
        self._call(node)

    def _view(self, node: fx.Node) -> list[Any] | None:
        x, *given = (value for _, value in _arguments(node))
        if node.target in VIEWS:
            return ["reshape", x, [self._item(size) for size in given[0]]]
        if node.target is aten.transpose.int:
            a, b = given
            return ["transpose", x, a, b] if type(a) is int and type(b) is int else None
        dim, begin, end, step = given
        if type(dim) is not int or type(step) is not int:
            return None
        return [
            "slice",
            x,
            dim,
            self._item(begin or 0),
            self._item(_END if end is None else end),
            step,
        ]

    def _item(self, value: Any) -> tuple[bool, int]:
        return (True, self.slot(value)) if isinstance(value, fx.Node) else (False, value)

    def _call(self, node: fx.Node) -> None:
        target = node.target
        assert isinstance(target, OpOverload)
        given = [_argument(kind, value, self) for kind, value in _arguments(node)]
        count = len(target._schema.returns)
        if count == 1:
            outputs = [self.slot(node)]
        else:
            outputs = [-1] * count
            for user in node.users:
                outputs[user.args[1]] = self.slot(user)  # type: ignore[index]
        name = target._schema.overload_name
        self.steps.append(("call", (target._schema.name, name, given, outputs)))


def _replace(module: fx.GraphModule, run: list[fx.Node]) -> None:
    """One node in place of a run, and one for each of its results that others read."""
    program = _Program(set(run))
    for node in run:
        if node.target is not operator.getitem:
            program.add(node)
    results = [n for n in run if n in program.slots and _is_read_outside(n, program.run)]
    _free(program, results)
    slots = program.slots
    made = machine.extension.Program(  # type: ignore[union-attr]
        len(slots), [slots[n] for n in program.inputs], [slots[n] for n in results]
    )
    for name, given in program.steps:
        getattr(made, name)(*given)
    number = made.keep()
    tensors = [module.get_buffer(str(n.target)) for n in program.bound]
    _bind(number, [slots[n] for n in program.bound], tensors)
    weakref.finalize(module, machine.extension.drop_program, number)  # type: ignore[union-attr]
    with module.graph.inserting_after(run[-1]):
        node = module.graph.call_function(_execute, (number, list(program.inputs)))
    after = node
    for at, result in enumerate(results):
        with module.graph.inserting_after(after):
            after = module.graph.call_function(operator.getitem, (node, at))
        result.replace_all_uses_with(after, lambda user: user not in program.run)
    last = after
    for old in _between(run[0], node):  # integers that others read come behind what they are of
        if _is_integer(old) and _is_read_outside(old, program.run):
            last.append(old)
            last = old
    for old in reversed(_between(run[0], node)):
        if old in program.run or (_is_integer(old) and not old.users):
            module.graph.erase_node(old)


def _between(first: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes from one up to another."""
    nodes = list(first.graph.nodes)
    return nodes[nodes.index(first) : nodes.index(end)]


def _is_read_outside(node: fx.Node, run: set[fx.Node]) -> bool:
    """Whether a call outside a run reads a node, or an integer that is made of it."""
    return any(
        _is_read_outside(user, run) if _is_integer(user) else user not in run for user in node.users
    )


def _free(program: _Program, results: list[fx.Node]) -> None:
    """Let go of each tensor with its last reader: a call is given it, of others it is dropped."""
    later = {program.slots[node] for node in (*results, *program.inputs, *program.bound)}
    steps: list[tuple[str, tuple[Any, ...]]] = []
    for name, given in reversed(program.steps):
        dropped = set()
        if name == "call":
            arguments = given[2]
            whole = {v for kind, v in arguments if kind == "O"}
            whole |= {v for kind, vs in arguments if kind in ("A", "B") for _, v in vs if v >= 0}
            places = {v: at for at, (kind, v) in enumerate(arguments) if kind == "T"}
            for slot, at in places.items():
                if slot not in later and slot not in whole:
                    arguments[at] = ("t", slot)
            read = whole | places.keys()
            dropped = whole - later
            dropped |= {slot for slot in given[3] if slot >= 0} - later - read
        elif name in _READERS:
            read = {given[1]}
            dropped = read - later
        else:
            read = set()
        if dropped:
            steps.append(("drop", ([(False, slot) for slot in sorted(dropped)],)))
        steps.append((name, given))
        later |= read
    program.steps[:] = reversed(steps)
