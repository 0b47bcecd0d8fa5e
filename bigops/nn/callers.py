"""Who else may reach a module: what the code of a model does with the modules that it holds.

A part that is traced alone proves what its own forward does. It proves nothing about the code
around it, which may call a child by itself (``self.block[0](x)``), slice, iterate, or call another
method. That code cannot be traced here, but its source can be read: a child is reached by its name.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from bigops.nn.atomic import CONTAINERS, is_ours
from bigops.nn.sites import Sites

# What gives the children of a module without their names, and what gives all below it.
_ONE_LEVEL = {"children", "named_children", "_modules"}
_ALL_LEVELS = {"modules", "named_modules", "get_submodule", "__dict__", "vars", "locals", "globals",
               "eval", "exec", "attrgetter"}  # fmt: skip
_STDLIB = sysconfig.get_path("stdlib")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


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

    The code is that of ``forward`` and of the hooks of each module, with the methods, properties
    and functions that they name, except torch's and those of other installed packages.
    """

    def __init__(self, sites: Sites) -> None:
        self._sites = sites
        self._code: dict[Any, Code] = {}
        self._held = {id(m) for holder in sites.modules.values() for m in _in_plain(holder)}

    def reason(self, root: str, paths: Iterable[str]) -> str | None:
        """Why code outside of the part at ``root`` may reach the modules at ``paths``, or None.

        Args:
            root: of a part whose forward is known: traced, or that of `nn.Sequential`.
            paths: of modules below it.
        """
        paths = list(paths)
        if any(id(self._sites.modules[p]) in self._held for path in paths for p in _upwards(path)):
            return "an attribute or a list of a module holds it, too"
        if root == "":
            return None  # nothing is outside
        outside = list(self._outside(root))
        for module, code in outside:
            if code.opaque:
                return f"{type(module).__name__} may reach it by {code.opaque}"
        why = self._taken(root, outside)
        if why is None or all(self._unnamed(root, path, outside) for path in paths):
            return None
        return why

    def _outside(self, root: str) -> Iterator[tuple[nn.Module, Code]]:
        for path, module in self._sites.unique():
            if path == root or path.startswith(f"{root}.") or is_known(module):
                continue
            key = id(module) if _attached(module) else type(module)
            if key not in self._code:
                self._code[key] = _code_of(module)
            yield module, self._code[key]

    def _taken(self, root: str, outside: list[tuple[nn.Module, Code]]) -> str | None:
        """Why the part may be more than called as a whole; else None."""
        for path in _upwards(root):
            holder, name = self._sites.parent(path), path.rpartition(".")[2]
            if type(holder).forward is nn.Sequential.forward:
                continue  # which does nothing but call it; who calls the holder?
            if hasattr(type(holder), "__getitem__"):
                return f"{type(holder).__name__} gives it without its name"
            for module, code in outside:
                own = module is holder and (name in code.own or code.own_children)
                if own or name in code.read:
                    return f"{type(module).__name__} takes {name!r} other than by calling it"
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
                return f"{type(module).__name__} takes children of a module without their names"
        return None

    def _unnamed(self, root: str, path: str, outside: list[tuple[nn.Module, Code]]) -> bool:
        """Whether nothing outside of the part names the module, nor a method on the way to it."""
        for below in (p for p in _upwards(path) if p.startswith(f"{root}.")):
            if hasattr(type(self._sites.parent(below)), "__getitem__"):
                continue
            names = {below.rpartition(".")[2]}
            for above in _upwards(below)[1:]:
                names |= _methods(type(self._sites.modules[above]))
                if above == root:
                    break
            named = any(names & (code.read | code.called) for _, code in outside)
            if not named and self._walked(below, outside) is None:
                return True
        return False


def is_known(module: nn.Module) -> bool:
    """Whether the code of a module is torch's or ours, which reaches into no other module."""
    known = is_ours(module) or type(module).__module__.startswith("torch.nn.")
    return known and not _attached(module)


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


def _in_plain(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that a module holds without being their parent: in lists, bound methods."""
    pending = [v for k, v in vars(module).items() if k != "_modules"]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, functools.partial):
            pending += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            pending.append(value.__self__)
        elif isinstance(value, FunctionType):
            pending += [c.cell_contents for c in value.__closure__ or () if _filled(c)]
        elif type(value) in CONTAINERS or type(value) is tuple:
            pending += value.values() if isinstance(value, dict) else value


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


# --- reading the source ----------------------------------------------------------------------


def _code_of(module: nn.Module) -> Code:
    cls = type(module)
    if "forward" in vars(module):
        return Code(opaque="a forward of its own instance")
    code = Code()
    pending: list[tuple[Any, bool]] = [  # functions, and whether their first argument is self
        *((hook, False) for name in _HOOKS for hook in getattr(module, name).values()),
        *_definitions(cls, "forward"),
        *_definitions(cls, "__call__"),
    ]
    seen: set[Any] = set()
    while pending and not code.opaque:
        value, method = pending.pop()
        function = _function(value)
        if function is None or (function, method) in seen or _is_foreign(function, cls):
            continue
        seen.add((function, method))
        pending.append((getattr(function, "__wrapped__", None), method))
        reader = _Reader(code, function.__code__.co_varnames[:1] if method else ())
        try:
            reader.visit(ast.parse(textwrap.dedent(inspect.getsource(function.__code__))))
        except (OSError, TypeError, SyntaxError):
            code.opaque = f"{function.__qualname__}, whose source is not there"
        if reader.walks > 1 or (reader.walks and function.__name__ in reader.said):
            code.opaque = f"{function.__qualname__}, which walks over children of children"
        for name in reader.attributes:
            pending += _definitions(cls, name)
        pending += ((f, False) for f in _globals(function, reader))
    return code


def _definitions(cls: type, name: str) -> list[tuple[Any, bool]]:
    """What a class and its bases define under a name, and whether it takes self."""
    found = [vars(c)[name] for c in cls.__mro__ if name in vars(c)]
    return [(f, not isinstance(f, staticmethod | classmethod)) for f in found]


def _function(value: Any) -> FunctionType | None:
    """The Python function behind a method, property, partial or callable object, or None."""
    for leaf in ("__func__", "fget", "func"):
        value = getattr(value, leaf, None) or value
    if isinstance(value, FunctionType | type) or value is None:
        return value if isinstance(value, FunctionType) else None
    call = vars(type(value)).get("__call__")
    return call if isinstance(call, FunctionType) else None


def _is_foreign(function: FunctionType, cls: type) -> bool:
    """Whether a function is torch's, or of an installed package that the class is not in."""
    home = str(function.__globals__.get("__name__"))
    top = home.partition(".")[0]
    if top in ("torch", "bigops"):
        return True
    installed = any(p in function.__code__.co_filename for p in ("-packages", _STDLIB))
    return installed and top not in {c.__module__.partition(".")[0] for c in cls.__mro__}


def _globals(function: FunctionType, reader: _Reader) -> Iterator[Any]:
    """Functions that a function names: of its file, of the scope around it, of a module."""
    around = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    scope = {**function.__globals__, **{n: c.cell_contents for n, c in around if _filled(c)}}
    for name in reader.names:
        if isinstance(scope.get(name), FunctionType | functools.partial | MethodType):
            yield scope[name]
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

    @property
    def said(self) -> set[str]:
        return self.names | self.attributes

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Attribute):
            self._attribute(function, called=True)
        elif isinstance(function, ast.Name):
            self.names.add(function.id)
            if function.id in _ALL_LEVELS:
                self.code.opaque = f"{function.id}()"
            if function.id == "getattr" and not all(
                isinstance(a, ast.Constant) for a in node.args[1:2]
            ):
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

    def _walk(self, of: ast.expr) -> None:
        self.walks += 1
        if isinstance(of, ast.Name) and of.id in self.itself:
            self.code.own_children = True
        else:
            self.code.children = True

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for child in node.body:  # decorators, defaults and annotations run once, not in a call
            self.visit(child)

    def visit_While(self, node: ast.While) -> None:
        before = self.walks
        self.generic_visit(node)
        self.walks += self.walks - before  # it may go down one level each time

    def visit_Name(self, node: ast.Name) -> None:
        self.names.add(node.id)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.code.read.update(node.value.split("."))

    def visit_MatchClass(self, node: ast.MatchClass) -> None:
        self.code.read.update(node.kwd_attrs)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.visit(node.value)
