"""Which channels of a model may be scaled without a change of its outputs: seen as it runs.

Where the input of ``x @ W.T`` is divided by s[j] in channel j and column j of W multiplied by it,
the product stays. x is so divided where what makes its channels is: the weight (and bias) of a norm
or the rows (and bias) of a product before, with nothing in between but what lets a scale of a
channel through, such as relu or the product with another tensor. `Channels` watches the operators
of a running model and joins all that has to share one s (union-find); an operator that does
anything else with such a value fixes s to 1 and is the reason. No class and no name is asked: a
norm is what multiplies by a vector of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from bigops.graph import channel_rules
from bigops.graph.atomic import LEAVES
from bigops.graph.channel_rules import Channel, Value
from bigops.graph.looking import storage_of
from bigops.graph.record import class_name
from bigops.graph.sites import Sites


class Side(NamedTuple):
    """A dimension of a Parameter by its name."""

    name: str
    dim: int


@dataclass
class Group:
    """Channels that share one s."""

    makers: list[Side] = field(default_factory=list)  # are divided
    readers: list[Side] = field(default_factory=list)  # are multiplied
    fixed: str | None = None  # why s is 1


class Channels(TorchDispatchMode):
    """Watches a model run, in `eval` with gradients off; `groups` says what was seen.

    What it proves holds for calls as those it has seen. A value that leaves the module in which its
    channels were made, other than by `nn.Sequential`, counts as read, since another call may return
    it; so does one that a module with hooks is given or gives.

    Args:
        sites: of the model.
        see: is given the name of each Parameter of a product, and the input [.., K].
    """

    def __init__(self, sites: Sites, see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._sites, self._see = sites, see
        self._values = WeakTensorKeyDictionary()
        self._above: dict[Channel, Channel] = {}
        self._fixed: dict[Channel, str] = {}  # by root
        self._reads: dict[Channel, bool] = {}  # of those in use: whether products read by it
        self._running: list[nn.Module] = []
        self._handles: list[Any] = []
        modules = list(sites.model.modules())
        self._shows_input = {id(m) for m in modules if m._forward_pre_hooks or m._forward_hooks}
        self._shows_output = {id(m) for m in modules if m._forward_hooks}
        self._parameters = {id(p): p for p in sites.model.parameters()}
        for parameter in self._parameters.values():
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                self.fix_parameter(id(parameter), "it is no floating-point Parameter")
        self._spans: dict[int | None, list[_Span]] = {}
        for tensor in (*self._parameters.values(), *sites.model.buffers()):
            self._lay(tensor)

    def _lay(self, tensor: Tensor) -> None:
        """Note where a tensor lies; fix what lies in the memory of another."""
        span = _span(tensor)
        if span is None:
            return
        beside = self._spans.setdefault(storage_of(tensor), [])
        for other in beside:
            if span.meets(other):
                for shared in (span, other):
                    self.fix_parameter(shared.tensor, "its memory is shared with another tensor")
        beside.append(span)

    # --- union-find --------------------------------------------------------------------------

    def root(self, channel: Channel) -> Channel:
        """What stands for all that is joined with a channel."""
        while (above := self._above.setdefault(channel, channel)) != channel:
            self._above[channel] = self._above[above]
            channel = above
        return channel

    def is_fixed(self, channel: Channel) -> bool:
        """Whether its s is 1."""
        return self.root(channel) in self._fixed

    def join(self, one: Channel, other: Channel) -> None:
        """Both share one s."""
        a, b = self.root(one), self.root(other)
        if a != b:
            self._above[b] = a
            if (reason := self._fixed.pop(b, None)) is not None:
                self._fixed.setdefault(a, reason)

    def fix(self, channel: Channel | None, reason: str) -> None:
        """Its s is 1."""
        if channel is not None:
            self._fixed.setdefault(self.root(channel), reason)

    def fix_parameter(self, parameter: int, reason: str) -> None:
        """Nothing of a Parameter is scaled."""
        self.fix(Channel(parameter, 0), reason)
        self.fix(Channel(parameter, 1), reason)

    def use(self, channel: Channel, reads: bool) -> None:
        """What a dimension of a Parameter does; it is fixed where it does both."""
        if self._reads.setdefault(channel, reads) != reads:
            self.fix(channel, "its weight is used transposed, too")

    def groups(self) -> Iterator[Group]:
        """All that was joined, and what was fixed."""
        found: dict[Channel, Group] = {}
        for channel, reads in self._reads.items():
            root = self.root(channel)
            group = found.setdefault(root, Group(fixed=self._fixed.get(root)))
            sides = group.readers if reads else group.makers
            sides.append(Side(self._sites.users[channel.parameter][0], channel.dim))
        yield from found.values()

    # --- what runs ---------------------------------------------------------------------------

    def __enter__(self) -> Channels:
        for module in self._sites.model.modules():
            self._handles += [
                module.register_forward_pre_hook(self._arrive, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self._handles:
            self._handles.pop().remove()

    def _arrive(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._running.append(module)
        if id(module) in self._shows_input:
            self._shown((args, kwargs), f"a hook of a {class_name(module)} is given it")

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """What a module returns is seen by others, unless it is what made it or only passes it."""
        if self._running and self._running[-1] is module:
            self._running.pop()
        if module is self._sites.model:
            self._shown(output, "the model returns it")
        elif id(module) in self._shows_output:
            self._shown(output, f"a hook of a {class_name(module)} is given it")
        elif type(module).forward is not nn.Sequential.forward:
            self._shown(output, f"a {class_name(module)} returns it", module)

    def _shown(self, shown: Any, reason: str, by: nn.Module | None = None) -> None:
        """Fix all scaled values in ``shown``; with ``by``, what was made further inside of it."""
        for tensor in _tensors(shown):
            value = self.value(tensor)
            if value is not None and (by is None or any(m is by for m in value.inside[:-1])):
                self.fix(value.channel, reason)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        values = {id(t): self.value(t) for t in given}
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        channel_rules.follow(self, channel_rules.Call(func, args, kwargs, given, values, made))
        return result

    def value(self, t: Tensor) -> Value | None:
        """What is known of a tensor; all of what it may be is fixed where it came unseen."""
        known: Value | None = self._values.get(t)
        if known is not None:
            return known
        if id(t) in self._parameters:
            if t.dim() == 1:
                self.use(Channel(id(t), 0), reads=False)
                return Value("a Parameter", Channel(id(t), 0), self.inside())
            return Value("a Parameter", matrix=(id(t), False)) if t.dim() == 2 else None
        storage = storage_of(t)
        if storage in self._spans:
            span = _span(t)
            for other in self._spans[storage] if span else ():
                if span.meets(other):  # type: ignore[union-attr]
                    self.fix_parameter(other.tensor, "a tensor that shares its memory is read")
        return None

    def inside(self) -> tuple[nn.Module, ...]:
        """The modules that run, outermost first."""
        return tuple(self._running)

    def set(self, t: Tensor, value: Value) -> None:
        """Say what is known of a tensor."""
        self._values[t] = value

    def read(self, parameter: int, x: Tensor) -> None:
        """Pass on what a product with a Parameter is given."""
        self._see(self._sites.users[parameter][0], x)


class _Span(NamedTuple):
    """Bytes of a storage."""

    begin: int
    end: int
    tensor: int  # id

    def meets(self, other: _Span) -> bool:
        return self.begin < other.end and other.begin < self.end


def _span(t: Tensor) -> _Span | None:
    """Where a tensor lies in its storage, or None of one that lies nowhere."""
    if t.layout is not torch.strided or t.is_meta or not t.numel():
        return None
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    begin = int(t.storage_offset()) * t.element_size()
    return _Span(begin, begin + int(last + 1) * t.element_size(), id(t))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in containers and objects."""
    pending, seen = [value], set()
    while pending:
        held = pending.pop()
        if isinstance(held, Tensor):
            yield held
        if isinstance(held, (*LEAVES, nn.Module)) or id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, Mapping):
            pending += held.values()
        if isinstance(held, list | tuple | set):
            pending += held
        elif isinstance(own := getattr(held, "__dict__", None), dict):
            pending += own.values()
