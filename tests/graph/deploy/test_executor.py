"""Programs: what the graph gives, bit for bit, without Python between the calls."""

from __future__ import annotations

import copy
import gc
import math
import operator
import os
import platform
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from bigops.backend import machine
from bigops.graph.deploy import executor
from tests.graph.deploy.encoder import inputs

pytestmark = pytest.mark.skipif(machine.extension is None, reason="needs the C++ extension")
aten = torch.ops.aten


class Graph:
    """Calls written down one by one; every input is a tensor."""

    def __init__(self, **buffers: Tensor) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        for name, tensor in buffers.items():
            self.root.register_buffer(name, tensor)

    def input(self, name: str) -> fx.Node:
        return self.graph.placeholder(name)

    def read(self, name: str) -> fx.Node:
        return self.graph.get_attr(name)

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def module(self, *results: fx.Node) -> fx.GraphModule:
        self.graph.output(tuple(results))
        return fx.GraphModule(self.root, self.graph)


def programs(module: fx.GraphModule) -> int:
    return sum(n.target is torch.ops.bigops.execute.default for n in module.graph.nodes)


def check(module: fx.GraphModule, *given: Tensor, count: int = 1) -> fx.GraphModule:
    made = executor.with_programs(module)
    assert programs(made) == count
    for one, other in zip(made(*given), module(*given), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    return made


def test_every_kind_of_argument() -> None:
    g = Graph(w=torch.randn(6, 4), b=torch.randn(6))
    x = g.input("x")
    product = torch.ops.bigops.fused_linear.code
    y = g(product, x, g.read("w"), g.read("b"), None, 1)
    rows, columns = g(aten.sym_size.int, y, 0), g(aten.sym_size.int, y, 1)
    half = g(operator.floordiv, g(operator.mul, columns, 2), 4)
    flat = g(aten.view.default, y, [g(operator.add, rows, 0), 1, columns])  # integers in a list
    cut = g(aten.slice.Tensor, flat, 2, 0, half)  # an integer of the run; optional integers
    both = g(aten.cat.default, [cut, flat], -1)  # tensors in a list
    at = g(aten.index.Tensor, both, [None, None, g.read("take")])  # optional ones
    soft = g(aten._softmax.default, at, -1, False)
    top, _ = g(aten.topk.default, soft, 2, -1, True, True), None
    values = g(operator.getitem, top, 0)
    mixed = g(aten.scaled_dot_product_attention.default, values, values, values, None, 0.0, False)
    heads = g(aten.unsqueeze.default, mixed, 0)
    scaled = g(torch.ops.bigops.attention.default, heads, heads, heads, None, False, 0.5)
    g.root.register_buffer("take", torch.tensor([0, 2, 5]))
    module = g.module(scaled, at)
    check(module, torch.randn(3, 4))
    check(module, torch.randn(1, 4))  # the sizes are those of the run


SHAPE = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    shape=SHAPE,
    steps=st.lists(
        st.tuples(st.sampled_from("tlr"), st.randoms(use_true_random=False)), max_size=6
    ),
)
def test_views_as_torch_has_them(shape: list[int], steps: list[Any]) -> None:
    """Transposed, cut with a step and from behind, and reshaped, with a size left open or not."""
    g, sizes = Graph(), list(shape)
    x = torch.arange(float(math.prod(shape))).reshape(shape)
    at = g.input("x")
    for _ in range(executor.LEAST):
        at = g(aten.relu.default, at)
    for kind, random in steps:
        d = random.randrange(-len(sizes), len(sizes))
        if kind == "t":
            e = random.randrange(-len(sizes), len(sizes))
            at = g(aten.transpose.int, at, d, e)
            sizes[d], sizes[e] = sizes[e], sizes[d]
        elif kind == "l":
            begin, end = random.choice([None, -3, 0, 1, 9]), random.choice([None, -1, 1, 3, 9])
            step = random.choice([1, 2])
            at = g(aten.slice.Tensor, at, d, begin, end, step)
            sizes[d] = len(range(sizes[d])[begin:end:step])
        else:
            total, made = math.prod(sizes), []
            for factor in random.sample([2, 3, 2, 1], 4):
                if total % factor == 0 and total > 0:
                    made.append(factor)
                    total //= factor
            made.append(total)
            random.shuffle(made)
            sizes = list(made)
            if math.prod(made) > 0 and random.random() < 0.5:
                made[random.randrange(len(made))] = -1
            at = g(aten.reshape.default, at, made)
    module = g.module(at)
    made = executor.with_programs(module)
    assert programs(made) == 1
    (one,), (other,) = made(x), module(x)
    assert torch.equal(one, other)


def test_what_cannot_be_passed_on_stays_a_node() -> None:
    g = Graph()
    x = g.input("x")
    for _ in range(executor.LEAST):
        x = g(aten.relu.default, x)
    x = g(aten.add.Tensor, x, 1.5)  # a Scalar
    for _ in range(executor.LEAST):
        x = g(aten.neg.default, x)
    check(g.module(x), torch.randn(5), count=2)


def test_sizes_of_results_inside_and_outside() -> None:
    """Of a size that only the program reads nothing leaves it; one of a size is read by others."""
    g = Graph()
    y = g.input("x")
    for _ in range(executor.LEAST):
        y = g(aten.relu.default, y)
    rows, columns = g(aten.sym_size.int, y, 0), g(aten.sym_size.int, y, 1)
    z = g(aten.reshape.default, y, [g(operator.mul, rows, columns)])
    more = g(operator.add, rows, 1)
    for _ in range(executor.LEAST):
        z = g(aten.neg.default, z)
    outside = g(aten.arange.default, more, device=torch.device("cpu"))
    module = g.module(z, outside)
    made = check(module, torch.randn(3, 2))
    check(module, torch.randn(1, 5))
    program = next(n for n in made.graph.nodes if n.target is torch.ops.bigops.execute.default)
    assert len(program.users) == 2  # z, and y for its rows


def test_few_calls_stay_as_they_are() -> None:
    g = Graph()
    x = g.input("x")
    for _ in range(executor.LEAST - 1):
        x = g(aten.relu.default, x)
    check(g.module(x), torch.randn(5), count=0)


def test_a_cache_is_written_in_place() -> None:
    g = Graph(cache=torch.zeros(4, 3))
    x = g.input("x")
    place = g(aten.slice.Tensor, g.read("cache"), 0, 1, 2)
    for _ in range(3):
        x = g(aten.relu.default, x)
    g(aten.copy_.default, place, x)
    made = executor.with_programs(g.module(g(aten.neg.default, x)))
    assert programs(made) == 1
    given = torch.rand(1, 3)
    made(given)
    assert torch.equal(made.get_buffer("cache")[1], given[0])


@pytest.mark.parametrize("by", ["a call", "a view", "a list"])
def test_a_result_is_freed_after_its_last_reader(by: str) -> None:
    """Of a chain two results stand at a time; inputs and buffers are never given away."""
    g = Graph(w=torch.ones(1 << 20))
    x = g.input("x")
    y = g(aten.mul.Tensor, x, g.read("w"))
    for _ in range(20):
        if by == "a view":
            y = g(aten.transpose.int, g(aten.reshape.default, y, [1 << 10, -1]), 0, 1)
        elif by == "a list":
            y = g(aten.cat.default, [y])
        y = g(aten.neg.default, y)
    y = g(aten.reshape.default, y, [-1])
    made = check(g.module(y), torch.ones(1 << 20))
    given = torch.ones(1 << 20)
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        (result,) = made(given)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert result.nbytes < most <= 3 * given.nbytes
    assert torch.equal(made(given)[0], result)  # what was lent is still there


FAULTS = """
import resource, torch, torch.nn.functional as F, bigops
class Chain(torch.nn.Module):
    def forward(self, x):
        for _ in range(8):
            x = F.hardtanh(x)
        return x.sum()
x = torch.randn(1 << 20)
deployed = bigops.deploy(Chain().eval(), x, dynamic=False)
for _ in range(5):
    deployed(x)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    deployed(x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


@pytest.mark.skipif(not platform.libc_ver()[0], reason="of glibc's malloc")
def test_memory_stays_from_call_to_call() -> None:
    """A tensor of 4 MB is 1024 pages."""
    plain = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=plain
    )
    assert float(run.stdout) < 200


def same(deployed: Any, given: dict[str, Tensor]) -> None:
    leaves = deployed.signature.leaves((), given)
    with torch.no_grad():
        expected = deployed.graph(*leaves)
    got = deployed(**given)
    for one, other in zip(got.values(), expected, strict=True):
        assert torch.equal(one, other)


def test_the_layers_of_an_encoder_are_one_program(deployed: Any) -> None:
    for sizes in ((3, 7), (1, 7), (5, 1), (2, 20)):
        same(deployed, inputs(*sizes))
    ready = deployed._ready()
    ours = [n for n in ready.graph.nodes if str(n.target).startswith("bigops.")]
    assert 0 < len(ours) == programs(ready)  # no kernel is called from Python


def test_a_copy_has_programs_of_its_own(deployed: Any) -> None:
    deployed(**inputs(2, 5))
    made = copy.deepcopy(deployed)
    with torch.no_grad():
        for buffer in made.buffers():
            if buffer.is_floating_point():
                buffer.mul_(1.5)
    same(made, inputs(2, 5))
    same(deployed, inputs(2, 5))


def test_tensors_that_are_exchanged_are_seen(deployed: Any) -> None:
    made = copy.deepcopy(deployed)
    made(**inputs(2, 5))
    other = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    name = next(n for n, t in other.items() if t.is_floating_point())
    other[name] += 1
    made.load_state_dict(other, assign=True)
    same(made, inputs(2, 5))


def test_threads_share_a_program(deployed: Any) -> None:
    given = [inputs(2, length) for length in range(3, 11)]
    expected = [deployed(**g)["last"] for g in given]
    wrong = []

    def work(at: int) -> None:
        for _ in range(20):
            if not torch.equal(deployed(**given[at])["last"], expected[at]):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_error_of_a_kernel_comes_through() -> None:
    g = Graph(w=torch.randn(6, 4))
    x = g.input("x")
    for _ in range(executor.LEAST):
        x = g(aten.relu.default, x)
    y = g(torch.ops.bigops.fused_linear.code, x, g.read("w"), None, None, 0)
    made = executor.with_programs(g.module(y))
    with pytest.raises(RuntimeError, match="expected"):
        made(torch.randn(3, 5))
    made(torch.randn(3, 4))


def test_a_program_is_dropped_with_its_module() -> None:
    g = Graph()
    x = g.input("x")
    for _ in range(executor.LEAST):
        x = g(aten.relu.default, x)
    made = executor.with_programs(g.module(x))
    number = next(n for n in made.graph.nodes if n.name.startswith("execute")).args[0]
    given = torch.randn(3)
    torch.ops.bigops.execute(number, [given])
    with pytest.raises(RuntimeError, match=r"inputs: expected 1 tensors; got 2"):
        torch.ops.bigops.execute(number, [given, given])
    del made, g, x
    gc.collect()
    with pytest.raises(RuntimeError, match="program: expected the number of one that is kept"):
        torch.ops.bigops.execute(number, [given])


def test_without_the_extension_the_graph_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "extension", None)
    g = Graph()
    x = g.input("x")
    for _ in range(executor.LEAST):
        x = g(aten.relu.default, x)
    check(g.module(x), torch.randn(3), count=0)


def test_inputs_that_no_kernel_can_read_take_the_graph(deployed: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {name: mode.from_tensor(tensor) for name, tensor in inputs(2, 5).items()}
        assert deployed(**given)["last"].shape == (2, 5, 64)
