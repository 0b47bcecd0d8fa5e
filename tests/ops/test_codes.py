"""The words that ops take and the codes that their kernels take: one table, in Python and in C++.

The default overload of each op takes words and is nothing but a decomposition; the values and
gradients of what it decomposes into are the matter of tests/ops/<op>.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bigops.ops
from bigops.backend import machine
from bigops.formats.sparse import SparseWeight
from bigops.ops import codes
from bigops.ops.library import encoder
from tests.support.kernels_ran import needs_extension

ops = torch.ops.bigops
# What saved programs hold: a table may only grow at its end.
SAVED = {
    "activation": "none relu relu2 gelu gelu_tanh silu sigmoid tanh swiglu geglu geglu_tanh reglu",
    "activations": "none dynamic symmetric static",
    "scales": "tensor row block",
    "reduction": "none mean sum",
    "choice": "given largest",
    "dtype": "bf16 f16",
    "kind": "layer rms",
}
SERVED_BY = ("CPU", "CUDA", "CompositeExplicitAutograd", "Autograd", "AutogradCPU", "Meta")


def overloads() -> list[torch._ops.OpOverload]:
    """Of the whole library."""
    defined = [n.removeprefix("bigops::") for n in torch.library._defs if n.startswith("bigops::")]
    packets = [getattr(ops, name) for name in sorted({n.split(".")[0] for n in defined})]
    return [getattr(packet, name) for packet in packets for name in packet.overloads()]


def takes_words(op: torch._ops.OpOverload) -> bool:
    return any(isinstance(a.type, torch.StringType) for a in op._schema.arguments)


def differs(tables: dict[str, Any], others: dict[str, Any]) -> list[str]:
    """The arguments of ``others`` whose words have not the same positions in ``tables``."""
    return [n for n, words in others.items() if list(tables[n])[: len(words)] != list(words)]


# tables ------------------------------------------------------------------------------------


def test_tables_only_grow_at_their_ends() -> None:
    assert not differs(codes.TABLES, {name: words.split() for name, words in SAVED.items()})
    assert codes.TABLES.keys() == SAVED.keys()
    for argument, words in codes.TABLES.items():
        assert [codes.code_of(argument, word) for word in words] == list(range(len(words)))
        assert [codes.word_of(argument, code) for code in range(len(words))] == list(words)


@needs_extension
def test_kernels_have_the_same_tables() -> None:
    assert machine.extension is not None
    theirs = machine.extension.codes()
    assert {"activation", "activations", "choice", "dtype", "kind"} == theirs.keys()
    assert not differs(codes.TABLES, theirs)
    assert not differs(theirs, {name: codes.TABLES[name] for name in theirs})


def test_triton_kernels_have_the_same_activations() -> None:
    pytest.importorskip("triton")
    from bigops.kernels.common import activation

    assert codes.TABLES["activation"] == activation.NAMES


@pytest.mark.parametrize("argument", SAVED)
def test_an_exchange_in_a_table_is_seen(argument: str) -> None:
    """The planted fault: two words of a table change places."""
    words = SAVED[argument].split()
    words[0], words[-1] = words[-1], words[0]
    assert differs(codes.TABLES, {argument: words}) == [argument]


# schemas -----------------------------------------------------------------------------------


def test_nothing_but_decompositions_takes_strings() -> None:
    """A string that goes through torch's stable ABI is never freed."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    worded = [op for op in overloads() if takes_words(op)]
    assert len(worded) > 20
    for op in worded:
        assert has(op.name(), "CompositeImplicitAutograd"), op
        assert not [key for key in SERVED_BY if has(op.name(), key)], op
        coded = str(op._schema).replace(f"{op.name()}(", f"{op.name()}.code(", 1)
        assert coded.replace("str ", "int ") == str(op._overloadpacket.code._schema)
    for op in set(overloads()) - set(worded):
        types = [str(a.type) for a in (*op._schema.arguments, *op._schema.returns)]
        assert not [kind for kind in types if "str" in kind], op
        assert not has(op.name(), "CompositeImplicitAutograd"), op


# words decompose ---------------------------------------------------------------------------


def case(name: str) -> tuple[Any, tuple[Any, ...]]:
    """(packet, arguments in words) of one op of each form."""
    torch.manual_seed(0)
    x, w, u, v = torch.randn(3, 16), torch.randn(8, 16), torch.randn(8, 4), torch.randn(4, 16)
    target = torch.randint(0, 8, (3,))
    tail = (None, None, "gelu")
    if name == "fused_linear":
        return ops.fused_linear, (x, w, None, None, "swiglu")
    if name == "low_rank_linear":
        return ops.low_rank_linear, (x, u, v, None, 0.5, None, None, "silu")
    if name == "linear_cross_entropy":
        options = ("sum", -100, 0.1, 0.0, 0.0, 1.0, 0.0)
        return ops.linear_cross_entropy, (x, w, target, *[None] * 5, *options)
    if name == "packed_linear":
        return ops.packed_linear, (x, *bigops.formats.PackedWeight.from_dense(w).arguments, *tail)
    if name == "quantized_linear":
        return ops.quantized_linear, (
            x,
            *bigops.formats.QuantizedWeight.from_dense(w).arguments,
            *tail,
        )
    if name == "fp8_linear":
        weight = bigops.formats.Fp8Weight.from_dense(w, scales="tensor")
        return ops.fp8_linear, (x, *weight.arguments, *tail)
    weight = SparseWeight.from_dense(w)
    return ops.sparse_linear, (x, *weight.arguments, *tail)


FORMS = (
    "fused_linear",
    "low_rank_linear",
    "linear_cross_entropy",
    "packed_linear",
    "quantized_linear",
    "fp8_linear",
    "sparse_linear",
)


def paths(packet: Any, args: tuple[Any, ...]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways of calling an op with words, as functions of x."""
    rest = args[1:]
    return {
        "packet": lambda x: packet(x, *rest),
        "overload": lambda x: packet.default(x, *rest),
        "codes by the packet": lambda x: packet(x, *encoder(packet.code)((x, *rest))[1:]),
        "compiled": torch.compile(lambda x: packet(x, *rest), fullgraph=True, backend="aot_eager"),
        "by keywords": lambda x: packet(
            **{a.name: v for a, v in zip(packet.default._schema.arguments, (x, *rest), strict=True)}
        ),
    }


@pytest.mark.parametrize("form", FORMS)
def test_words_give_what_their_codes_give(form: str) -> None:
    packet, args = case(form)
    coded = encoder(packet.code)(args)
    x = coded[0].requires_grad_()
    want = packet.code(*coded)
    (want_grad,) = torch.autograd.grad(want.sum(), x)
    for name, path in paths(packet, args).items():
        got = path(x)
        (grad,) = torch.autograd.grad(got.sum(), x)
        assert torch.equal(got, want), name
        assert torch.equal(grad, want_grad), name
    with torch.inference_mode():
        assert torch.equal(packet(*args), want)
    both = x.detach().expand(2, *x.shape)
    over = [
        torch.vmap(lambda t, op=op, a=a: op(t, *a[1:]))(both)
        for op, a in ((packet, args), (packet.code, coded))
    ]
    assert torch.equal(*over)
    assert packet(*(a.to("meta") if isinstance(a, Tensor) else a for a in args)).shape == want.shape


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_the_decomposition(form: str) -> None:
    packet, (x, *rest) = case(form)
    # torch compares float8 arguments by a product that it does not have
    tests = {"test_utils": ("test_faketensor", "test_aot_dispatch_dynamic")}
    options = tests if form == "fp8_linear" else {}
    torch.library.opcheck(packet.default, (x.requires_grad_(), *rest), **options)


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_program_with_words_runs_and_decomposes(form: str, tmp_path: Path) -> None:
    packet, (x, *rest) = case(form)

    class Host(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return packet(x, *rest)  # type: ignore[no-any-return]

    program = torch.export.export(Host(), (x,))
    assert any(node.target is packet.default for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "words.pt2")
    loaded = torch.export.load(tmp_path / "words.pt2")
    assert torch.equal(loaded.module()(x), packet(x, *rest))
    inside = {node.target for node in loaded.run_decompositions().graph.nodes}
    assert packet.code in inside
    assert packet.default not in inside


def test_a_public_call_is_saved_with_its_code(tmp_path: Path) -> None:
    _, (x, w, *_) = case("fused_linear")

    class Host(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return bigops.fused_linear(x, w, None, None, "geglu")

    with torch.no_grad():
        torch.export.save(torch.export.export(Host(), (x,)), tmp_path / "codes.pt2")
    loaded = torch.export.load(tmp_path / "codes.pt2")
    (call,) = (n for n in loaded.graph.nodes if n.target is ops.fused_linear.code)
    assert call.args[-1] == codes.code_of("activation", "geglu")
    assert torch.equal(loaded.module()(x), bigops.fused_linear(x, w, None, None, "geglu"))


# what is no word, what is no code ------------------------------------------------------------

ARGUMENTS = {
    "activation": "fused_linear",
    "activations": "quantized_linear",
    "scales": "fp8_linear",
    "reduction": "linear_cross_entropy",
}


def replaced(form: str, argument: str, value: Any, coded: bool) -> tuple[Any, list[Any]]:
    packet, args = case(form)
    given = encoder(packet.code)(args) if coded else list(args)
    given[[a.name for a in packet.default._schema.arguments].index(argument)] = value
    return packet, given


@pytest.mark.parametrize(("argument", "form"), ARGUMENTS.items())
def test_what_is_no_word_is_named(argument: str, form: str) -> None:
    packet, args = replaced(form, argument, "swish", coded=False)
    words = ", ".join(codes.TABLES[argument])
    with pytest.raises(ValueError, match=f"^{argument}: expected one of {words}; got 'swish'$"):
        packet(*args)


@pytest.mark.parametrize("code", [-1, 99])
@pytest.mark.parametrize(("argument", "form"), ARGUMENTS.items())
def test_what_is_no_code_is_named(argument: str, form: str, code: int) -> None:
    packet, args = replaced(form, argument, code, coded=True)
    words = codes.TABLES[argument]
    said = f"{argument}: expected a code from 0 to {len(words) - 1} "
    said += rf"\({words[0]} to {words[-1]}\); got {code}$"
    with pytest.raises((ValueError, RuntimeError), match=said):
        packet.code(*args)
    with pytest.raises(ValueError, match=said):
        packet.code(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
