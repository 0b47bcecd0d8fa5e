"""Who else may reach a module: what the code of a model does with the modules that it holds.

A part that is traced alone proves what its own forward does. It proves nothing about the code
around it, which may call a child by itself (``self.block[0](x)``), slice, iterate, or call another
method. That code cannot be traced here, but its source can be read: a child is reached by its name.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from bigops.graph.atomic import CONTAINERS, is_ours
from bigops.graph.holders import is_filled
from bigops.graph.record import class_name
from bigops.graph.sites import Sites

# What gives the children of a module without their names, and what gives all below it.
_ONE_LEVEL = {"children", "named_children", "_modules"}
_ALL_LEVELS = {
    "modules",
    "named_modules",
    "get_submodule",
    "__dict__",
    "vars",
    "locals",
    "globals",
    "eval",
    "exec",
    "attrgetter",
    "methodcaller",
}
_BY_NAME = (operator.attrgetter, operator.methodcaller)  # take what strings say, which are hidden
_GETATTR = {"__getattr__", "__getattribute__"}
_STDLIB = sysconfig.get_path("stdlib")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_TORCH = frozenset(vars(nn.Module()))


@dataclass
class Code:
    """Attributes in the code that a call of a module runs, as far as the source says it."""

    own: set[str] = field(default_factory=set)  # ``self.name``, taken other than by calling it
    read: set[str] = field(default_factory=set)  # the same of anything but self; all strings
    called: set[str] = field(default_factory=set)  # called, of anything but self
    own_children: bool = False  # those of self are taken without their names
    children: bool = False  # those of something else are, one level of them
    opaque: str = ""  # what gives all modules below one, or a function without source


class Callers:
    """The code of a model's modules, and whether it may reach a module from outside of a part.

    The code is that of ``forward`` and of the hooks of each module, with the methods, properties,
    functions and objects that they name, except torch's and those of other installed packages.
    Of the modules in a part it is what a trace of the part does not run: the hooks and ``__call__``
    of the part itself, and the hooks of torch's layers.
    """

    def __init__(self, sites: Sites) -> None:
        self._sites = sites
        self._code: dict[Any, Code] = {}
        self._kept: list[Any] = []  # what the keys name by id

    def reason(self, root: str, paths: Iterable[str]) -> str | None:
        """Why code outside of the part at ``root`` may reach the modules at ``paths``, or None.

        Args:
            root: of a part whose forward is known: traced, or that of `nn.Sequential`.
            paths: of modules below it.
        """
        paths = list(paths)
        if any(p in self._sites.held for path in paths for p in _upwards(path)):
            return "an attribute or a list of a module holds it, too"
        outside, untraced = list(self._outside(root)), list(self._untraced(root))
        for module, code in (*outside, *untraced):
            if code.opaque:
                return f"{class_name(module)} may reach it by {code.opaque}"
        why = self._taken(root, outside) if root else None  # else nothing is outside
        if why is None and untraced:
            why = f"{class_name(untraced[0][0])} has code that tracing does not run"
        if why is None or all(self._unnamed(root, path, outside + untraced) for path in paths):
            return None
        return why

    def _outside(self, root: str) -> Iterator[tuple[nn.Module, Code]]:
        for path, module in self._sites.unique():
            if _below(path, root) or is_known(module):
                continue
            held = [v for k, v in vars(module).items() if k not in _OF_TORCH and _may_call(v)]
            attached = id(module) if _attached(module) else None
            key = (type(module), attached, *map(id, held))
            if key not in self._code:
                self._kept.append(held)
                self._code[key] = _code_of(module)
            yield module, self._code[key]

    def _untraced(self, root: str) -> Iterator[tuple[nn.Module, Code]]:
        for path, module in self._sites.unique():
            inside = path == root or (_below(path, root) and _is_library(module))
            if inside and (_attached(module) or type(module).__call__ is not nn.Module.__call__):
                yield module, _code_of(module, traced=True)

    def _taken(self, root: str, outside: list[tuple[nn.Module, Code]]) -> str | None:
        """Why the part may be more than called as a whole; else None."""
        for path in _upwards(root):
            holder, name = self._sites.parent(path), path.rpartition(".")[2]
            if type(holder).forward is nn.Sequential.forward:
                continue  # which does nothing but call it; who calls the holder?
            if hasattr(type(holder), "__getitem__"):
                return f"{class_name(holder)} gives it without its name"
            for module, code in outside:
                own = module is holder and (name in code.own or code.own_children)
                if own or name in code.read:
                    return f"{class_name(module)} takes {name!r} other than by calling it"
            return self._walked(path, outside)
        return None

    def _walked(self, path: str, outside: list[tuple[nn.Module, Code]]) -> str | None:
        """Why the children of what holds the module at ``path`` may be taken one by one, or None.

        Only those of a module that is taken itself: as an element of a container, as ``self``, or
        by its name.
        """
        above = path.rpartition(".")[0]
        name = above.rpartition(".")[2]
        listed = above == "" or hasattr(type(self._sites.parent(above)), "__getitem__")
        for module, code in outside:
            if code.children and (listed or any(name in c.own | c.read for _, c in outside)):
                return f"{class_name(module)} takes children of a module without their names"
        return None

    def _unnamed(self, root: str, path: str, outside: list[tuple[nn.Module, Code]]) -> bool:
        """Whether nothing outside of the part names the module, nor a method on the way to it."""
        for below in (p for p in _upwards(path) if p != root and _below(p, root)):
            if hasattr(type(self._sites.parent(below)), "__getitem__"):
                continue
            names = {below.rpartition(".")[2]}
            for above in _upwards(below)[1:]:
                names |= _methods(type(self._sites.modules[above]))
                if above == root:
                    break
            else:
                names |= _methods(type(self._sites.modules[root]))
            named = any(names & (code.read | code.called) for _, code in outside)
            if not named and self._walked(below, outside) is None:
                return True
        return False


def is_known(module: nn.Module) -> bool:
    """Whether the code of a module is torch's or ours, which reaches into no other module."""
    return _is_library(module) and not _attached(module)


def _is_library(module: nn.Module) -> bool:
    return is_ours(module) or type(module).__module__.startswith("torch.nn.")


def _below(path: str, root: str) -> bool:
    """Whether a module is the part at ``root``, or in it."""
    return root in ("", path) or path.startswith(f"{root}.")


def _attached(module: nn.Module) -> bool:
    """Whether a module has code beside that of its class."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


def _upwards(path: str) -> list[str]:
    """``a.b.c``, ``a.b``, ``a``."""
    names = path.split(".")
    return [".".join(names[:i]) for i in range(len(names), 0, -1)]


def _methods(cls: type) -> set[str]:
    """What a class of the user offers beside its forward."""
    own = [c for c in cls.__mro__ if not c.__module__.startswith("torch.") and c is not object]
    return {n for c in own for n in vars(c) if not n.startswith("__") and n != "forward"}


# --- reading the source ----------------------------------------------------------------------


def _code_of(module: nn.Module, traced: bool = False) -> Code:
    """The code of a module; of one that was traced, what beside its forward a call runs."""
    cls = type(module)
    if "forward" in vars(module):
        return Code(opaque="a forward of its own instance")
    code = Code()
    found = _Found(module)
    for name in _HOOKS:
        found.take(dict(getattr(module, name)))
    for name in ("__call__",) if traced else ("forward", "__call__"):
        for value in _definitions(cls, name):
            found.take(value, method=not traced)
    seen: set[Any] = set()
    while found.functions and not code.opaque:
        function, method = found.functions.pop()
        if (function, method) in seen or _is_foreign(function, cls):
            continue
        seen.add((function, method))
        found.take(getattr(function, "__wrapped__", None), method)
        reader = _Reader(code, function.__code__.co_varnames[:1] if method else ())
        try:
            reader.read(function)
        except (OSError, TypeError, SyntaxError):
            code.opaque = f"{function.__qualname__}, whose source is not there"
        if reader.walks > 1 or (reader.walks and function.__name__ in reader.said):
            code.opaque = f"{function.__qualname__}, which walks over children of children"
        found.name(reader.attributes, method=not traced)
        for value in _named(function, reader):
            found.take(value)
        code.opaque = code.opaque or found.opaque
    return code


class _Found:
    """Functions that the code of a module comes to, by the names and the objects in it."""

    def __init__(self, module: nn.Module) -> None:
        self.functions: list[tuple[FunctionType, bool]] = []  # and whether they take the module
        self.opaque = ""
        self._own, self._cls = vars(module), type(module)
        self._classes: list[type] = []  # of other objects
        self._names: set[str] = set()
        self._seen: set[int] = set()
        self._kept: list[Any] = []  # or an id could come again

    def name(self, names: set[str], method: bool) -> None:
        """Take in the methods and attributes of these names."""
        new = names - self._names
        self._names |= new
        for name in new:
            for value in _definitions(self._cls, name):
                self.take(value, method and not isinstance(value, staticmethod | classmethod))
            if name not in _OF_TORCH:
                self.take(self._own.get(name))
            for cls in self._classes:
                for value in _definitions(cls, name):
                    self.take(value)

    def take(self, value: Any, method: bool = False) -> None:
        """Take in what a name stands for; ``method``: its first argument is the module."""
        function = _function(value)
        if function is not None:
            self.functions.append((function, method))
        if id(value) in self._seen or not _may_call(value) or isinstance(value, nn.Module):
            return
        self._seen.add(id(value))
        self._kept.append(value)
        if isinstance(value, _BY_NAME):
            self.opaque = f"an {type(value).__name__}"
        elif isinstance(value, FunctionType):
            for given in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                self.take(given)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self.take(part)
        elif type(value) in CONTAINERS or type(value) is tuple:
            for item in list(value.values() if isinstance(value, dict) else value):
                self.take(item)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, MethodType):
            self.take(value.__self__)
        elif not isinstance(value, ModuleType):
            self._class(type(value))
            for item in list(getattr(value, "__dict__", {}).values()):
                self.take(item)

    def _class(self, cls: type) -> None:
        """The methods of an object that is no module, as far as they are named."""
        if cls in self._classes or issubclass(cls, nn.Module) or _is_installed(cls, self._cls):
            return
        self._classes.append(cls)
        for name in {"__init__", "__call__", *self._names}:
            for value in _definitions(cls, name):
                # that of a dataclass is made of a string, and assigns
                made = getattr(getattr(value, "__code__", None), "co_filename", "") == "<string>"
                if not (made and name == "__init__"):
                    self.take(value)


def _may_call(value: Any) -> bool:
    """Whether code may be in a value: not in numbers, strings and tensors."""
    return not isinstance(value, bool | int | float | complex | str | bytes | Tensor | None)


def _definitions(cls: type, name: str) -> list[Any]:
    """What a class and its bases define under a name."""
    return [vars(c)[name] for c in cls.__mro__ if name in vars(c)]


def _function(value: Any) -> FunctionType | None:
    """The Python function behind a method, property, partial or callable object, or None."""
    for leaf in ("__func__", "fget", "func"):
        value = getattr(value, leaf, None) or value
    if isinstance(value, FunctionType | type) or value is None:
        return value if isinstance(value, FunctionType) else None
    call = vars(type(value)).get("__call__")
    return call if isinstance(call, FunctionType) else None


def _is_installed(cls: type, of: type) -> bool:
    """Whether a class is torch's, Python's, or of an installed package that ``of`` is not in."""
    functions = (f for f in map(_function, vars(cls).values()) if f is not None)
    first = next(functions, None)
    return first is None or _is_foreign(first, of)


def _is_foreign(function: FunctionType, cls: type) -> bool:
    """Whether a function is torch's, or of an installed package that the class is not in."""
    home = str(function.__globals__.get("__name__"))
    top = home.partition(".")[0]
    if top in ("torch", "bigops"):
        return True
    installed = any(p in function.__code__.co_filename for p in ("-packages", _STDLIB))
    return installed and top not in {c.__module__.partition(".")[0] for c in cls.__mro__}


def _named(function: FunctionType, reader: _Reader) -> Iterator[Any]:
    """What a function names: of its file, of the scope around it, of a module."""
    around = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    scope = {**function.__globals__, **{n: c.cell_contents for n, c in around if is_filled(c)}}
    for name in reader.names:
        yield scope.get(name)
    for name, leaf in reader.dotted:
        if isinstance(scope.get(name), ModuleType):
            yield getattr(scope[name], leaf, None)


class _Reader(ast.NodeVisitor):
    """Collects the names in one function."""

    def __init__(self, code: Code, itself: tuple[str, ...]) -> None:
        self.code, self.itself = code, itself
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.dotted: set[tuple[str, str]] = set()
        self.walks = 0  # how often children are taken without their names

    def read(self, function: FunctionType) -> None:
        """Take in the source of a function, or of the lambda that it is."""
        source = ast.parse(textwrap.dedent(inspect.getsource(function.__code__)))
        for statement in source.body:
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                for child in statement.body:  # the rest ran when it was made
                    self.visit(child)
            else:
                self.visit(statement)

    @property
    def said(self) -> set[str]:
        return self.names | self.attributes

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Attribute):
            self._attribute(function, called=True)
            if function.attr in _GETATTR and not _says(node.args[:1]):
                self._walk(function.value)
            if function.attr == "apply" and self._is_own(function.value):
                self.code.opaque = "apply()"
        elif isinstance(function, ast.Name):
            self.names.add(function.id)
            if function.id in _ALL_LEVELS:
                self.code.opaque = f"{function.id}()"
            if function.id == "getattr" and not _says(node.args[1:2]):
                self._walk(node.args[0] if node.args else function)
        else:
            self.visit(function)
        for child in (*node.args, *node.keywords):
            self.visit(child)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._attribute(node, called=False)

    def _attribute(self, node: ast.Attribute, called: bool) -> None:
        if isinstance(node.value, ast.Name) and node.value.id in self.itself:
            if not called:
                self.code.own.add(node.attr)
        else:
            (self.code.called if called else self.code.read).add(node.attr)
        self.attributes.add(node.attr)
        if node.attr in _ALL_LEVELS:
            self.code.opaque = f"{node.attr}()"
        if node.attr in _ONE_LEVEL:
            self._walk(node.value)
        if isinstance(node.value, ast.Name):
            self.dotted.add((node.value.id, node.attr))
        self.visit(node.value)

    def _is_own(self, node: ast.expr) -> bool:
        """Whether this is ``self``, or an attribute of it."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in self.itself

    def _walk(self, of: ast.expr) -> None:
        self.walks += 1
        if isinstance(of, ast.Name) and of.id in self.itself:
            self.code.own_children = True
        else:
            self.code.children = True

    def visit_While(self, node: ast.While) -> None:
        before = self.walks
        self.generic_visit(node)
        self.walks += self.walks - before  # it may go down one level each time

    def visit_Name(self, node: ast.Name) -> None:
        self.names.add(node.id)
        if node.id == "getattr":  # under another name, or given to map()
            self.code.opaque = "getattr"

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.code.read.update(node.value.split("."))

    def visit_MatchClass(self, node: ast.MatchClass) -> None:
        self.code.read.update(node.kwd_attrs)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.visit(node.value)


def _says(name: list[ast.expr]) -> bool:
    """Whether an argument is there and a constant."""
    return bool(name) and isinstance(name[0], ast.Constant)
