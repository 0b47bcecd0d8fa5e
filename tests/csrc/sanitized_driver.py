"""Runs kernels of a build of the extension given by its path (test_sanitizers.py).

Values are not looked at: that is the business of the tests. Storage is made by the public
functions only.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from typing import Any


def load(path: str) -> None:
    """Make the file bigops._C before anything of bigops is imported."""
    spec = importlib.util.spec_from_file_location("bigops._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bigops._C"] = module
    spec.loader.exec_module(module)


import torch  # noqa: E402  torch's libraries must be there before the extension

load(sys.argv[1])

from bigops.backend import machine  # noqa: E402
from bigops.formats.packed import PackedWeight  # noqa: E402
from bigops.formats.patterns import Pattern  # noqa: E402
from bigops.formats.quantize import quantize_u8, static_qparams  # noqa: E402
from bigops.formats.quantized import QuantizedWeight  # noqa: E402
from bigops.formats.sparse import SparseWeight  # noqa: E402
from bigops.ops.fused_adamw import fused_sgd  # noqa: E402
from bigops.ops.fused_linear import fused_linear  # noqa: E402
from bigops.ops.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from bigops.ops.norm import norm, norm_act_quant, norm_with_sum  # noqa: E402
from bigops.ops.packed_linear import packed_linear  # noqa: E402
from bigops.ops.quantized_embedding import quantized_embedding  # noqa: E402
from bigops.ops.quantized_linear import quantized_linear  # noqa: E402
from bigops.ops.rotary import rotary  # noqa: E402
from bigops.ops.sparse_linear import sparse_linear  # noqa: E402
from bigops.train import SGD, Adam, AdamW  # noqa: E402

extension: Any = machine.extension
assert extension is not None, machine.extension_error
assert extension.__file__ == sys.argv[1]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
PLAIN = ("none", "relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
GATED = ("swiglu", "geglu", "geglu_tanh", "reglu")
QUANTISED: list[dict[str, Any]] = [
    {},
    {"symmetric": False},
    {"activations": "symmetric"},
    {"activations": "none"},
    {"group": 32},
    {"bits": 4, "group": 32, "symmetric": False},
    {"bits": 4},
    {"bits": 4, "group": 64, "activations": "dynamic"},
    {"symmetric": False, "activations": "static", "x_qparams": static_qparams(-2.0, 3.0)},
    {"bits": 4, "group": 32, "activations": "static", "x_qparams": static_qparams(-2.0, 3.0)},
]
# rows, outputs, columns: none fills a vector, a tile, a panel or a chunk; some are empty
SHAPES = [
    (1, 1, 1),
    (2, 3, 5),
    (5, 37, 83),
    (7, 17, 131),
    (19, 70, 259),
    (67, 9, 33),
    (130, 5, 66),
    (0, 3, 4),
    (3, 0, 4),
    (3, 4, 0),
    (1, 0, 0),
]


def both_ways(f: Callable[..., torch.Tensor], *leaves: torch.Tensor | None) -> None:
    """Inference, then forward and backward."""
    with torch.no_grad():
        f(*leaves)
    fresh = [None if t is None else t.clone().requires_grad_() for t in leaves]
    y = f(*fresh)
    y.backward(torch.randn_like(y))


def tensors(m: int, n: int, k: int, dtype: torch.dtype, full: bool) -> tuple[Any, Any, Any]:
    x = torch.randn(m, k).to(dtype)
    if not full:
        return x, None, None
    return x, torch.randn(n).to(dtype), torch.randn(m, n).to(dtype)


def at_every_level(run: Callable[[str, int, int, int], None]) -> None:
    for level in extension.isas():
        extension.set_isa(level)
        for m, n, k in SHAPES:
            run(level, m, n, k)


def run_fused_linear() -> None:
    for name in (*DTYPES, "f64"):  # our kernel, whatever the size
        extension.set_crossover("fused_linear", name, 1 << 40, 1 << 60)
    names = itertools.cycle((*PLAIN, *GATED))

    def run(level: str, m: int, n: int, k: int) -> None:
        for dtype in (*DTYPES.values(), torch.float64):
            for _ in range(3):
                name = next(names)
                rows = 2 * n if name in GATED else n
                w = torch.randn(rows, k).to(dtype)
                x, _, residual = tensors(m, n, k, dtype, True)
                bias = torch.randn(rows).to(dtype)
                both_ways(
                    lambda *t, name=name: fused_linear(*t, activation=name), x, w, bias, residual
                )
            both_ways(fused_linear, x, torch.randn(n, k).to(dtype), None, None)

    at_every_level(run)


def run_packed_linear() -> None:
    names = itertools.cycle(PLAIN)

    def run(level: str, m: int, n: int, k: int) -> None:
        for i, dtype in enumerate(DTYPES.values()):
            weight, name = PackedWeight.from_dense(torch.randn(n, k).to(dtype)), next(names)
            both_ways(
                lambda x, *rest, name=name, weight=weight: packed_linear(x, weight, *rest, name),
                *tensors(m, n, k, dtype, i == 0),
            )

    at_every_level(run)


def run_linear_cross_entropy() -> None:
    def run(level: str, m: int, n: int, k: int) -> None:
        target = torch.randint(0, n, (m,)) if n else torch.full((m,), -100)
        target[1::3] = -100
        for dtype in (*DTYPES.values(), torch.float64):
            x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
            for options in (
                {},
                {"reduction": "none", "label_smoothing": 0.1},
                {"softcap": 3.0, "z_loss": 0.1, "class_weight": torch.rand(n)},
            ):

                def call(x: Any, w: Any, b: Any, options: Any = options) -> torch.Tensor:
                    return linear_cross_entropy(x, w, target, b, **options)

                if n:  # predictions of a last vector that is not full
                    linear_cross_entropy(
                        x.to(dtype), weight.to(dtype), target, return_stats=True, **options
                    )
                both_ways(call, *(t.to(dtype) for t in (x, weight, bias)))
                both_ways(call, x.to(dtype), weight.to(dtype), None)

    at_every_level(run)


def run_norm() -> None:
    def run(level: str, m: int, n: int, k: int) -> None:
        for dtype in DTYPES.values():
            x, weight = torch.randn(m, n, k).to(dtype), torch.randn(k).to(dtype)
            strided = torch.randn(m, n, k + 3).to(dtype)[..., 1 : k + 1]
            for kind in ("layer", "rms"):
                norm(x, weight, weight, kind=kind)
                norm(strided, weight.float(), kind=kind)
                norm_with_sum(x, None, weight, strided, kind=kind)
                for flag in (False, True):
                    norm_act_quant(
                        strided, weight, None, x, kind=kind, symmetric=flag, keep_sum=flag
                    )

    at_every_level(run)


def run_rotary() -> None:
    def run(level: str, m: int, n: int, k: int) -> None:
        for dtype in DTYPES.values():
            x = torch.randn(2, m, 3 * k + 1).to(dtype)[..., 1:].unflatten(-1, (3, k))
            for r in (k // 2 * 2, k // 4 * 2):
                table = torch.randn(2, m, r + 1).to(dtype)[..., 1:]
                rotary(x.transpose(1, 2), table, table)
                rotary(x.transpose(1, 2), table[:1].float(), table[:1].float())

    at_every_level(run)


def run_quantized_linear() -> None:
    names = itertools.cycle(PLAIN)

    def run(level: str, m: int, n: int, k: int) -> None:
        for options in QUANTISED:
            weight: Any = QuantizedWeight.from_dense(torch.randn(n, k), **options)
            for i, dtype in enumerate(DTYPES.values()):
                name = next(names)
                both_ways(
                    lambda x, *rest, name=name, weight=weight: quantized_linear(
                        x, weight, *rest, name
                    ),
                    *tensors(m, n, k, dtype, i == 0),
                )
            with_qparams(
                lambda x, qparams, weight=weight: quantized_linear(x, weight, y_qparams=qparams),
                torch.randn(m, k),
                options.get("activations") == "static",
            )

    at_every_level(run)


def run_quantized_embedding() -> None:
    def run(level: str, m: int, n: int, k: int) -> None:
        for options, dtype in itertools.product(QUANTISED, DTYPES.values()):
            if n == 0 or options.get("activations") == "static":  # whose rows lie as others do
                continue
            weight = QuantizedWeight.from_dense(torch.randn(n, k), **options)
            ids = torch.randint(0, n, (m,))
            ids[:1] = n - 1  # the last row, behind which there is no memory
            quantized_embedding(ids, weight, dtype)
            quantized_embedding(ids.int(), weight, dtype)
            for outside in (-1, n, 2**62):
                bad = ids * 0 + outside
                said = error_of(lambda bad=bad, w=weight: quantized_embedding(bad, w))
                assert m == 0 or "ids: expected rows" in said, said

    at_every_level(run)


def with_qparams(call: Callable[..., torch.Tensor], x: torch.Tensor, u8: bool) -> None:
    """u8 from floats, and u8 to u8 and to floats."""
    with torch.no_grad():
        call(x, static_qparams(-3.0, 5.0))
        if u8:
            q = quantize_u8(x, static_qparams(-2.0, 3.0))
            call(q, static_qparams(-3.0, 5.0))
            call(q, None)


def sparse(n: int, k: int, pattern: str, dtype: torch.dtype) -> Any:
    how = Pattern.parse(pattern)
    w = torch.randn(n, k)
    return SparseWeight.from_mask(w, how.mask(w, 0.7), dtype, (how.height, how.width))


def run_sparse_linear() -> None:
    names = itertools.cycle(PLAIN)

    def run(level: str, m: int, n: int, k: int) -> None:
        for pattern, stored in itertools.product(
            ("1x1", "4x1", "16x1", "1x4"), (torch.int8, torch.float32, torch.bfloat16)
        ):
            weight = sparse(n, k, pattern, stored)
            trains = stored != torch.int8
            served = [torch.bfloat16] if stored == torch.bfloat16 else DTYPES.values()
            for i, dtype in enumerate(served):
                name, leaves = next(names), tensors(m, n, k, dtype, i == 0)

                def call(
                    x: Any,
                    bias: Any,
                    residual: Any,
                    values: Any = None,
                    w: Any = weight,
                    name: str = name,
                ) -> torch.Tensor:
                    full = w if values is None else w.replace(values=values)
                    return sparse_linear(x, full, bias, residual, name)

                both_ways(call, *leaves, *([weight.values] if trains else []))
            if stored == torch.int8:
                with_qparams(
                    lambda x, qparams, w=weight: sparse_linear(
                        x, w, x_qparams=static_qparams(-2.0, 3.0), y_qparams=qparams
                    ),
                    torch.randn(m, k),
                    True,
                )

    at_every_level(run)
    torch.set_num_threads(3)
    for stored in (torch.int8, torch.float32):  # many tasks, the 64-bit sums of a long row
        weight = sparse(600, 1500, "1x1", stored)
        both_ways(lambda x, w=weight: sparse_linear(x, w), torch.randn(70, 1500))
    weight = SparseWeight.from_mask(torch.ones(3, 70000), torch.ones(3, 17500).bool())
    both_ways(lambda x: sparse_linear(x, weight), torch.ones(9, 70000))


def run_fused_adamw() -> None:
    """Every dtype and form of a step, tails of vectors and blocks, several threads."""
    shapes = [(), (0,), (1,), (255,), (257,), (4099,), (70, 131), (16385,)]
    forms: list[dict[str, Any]] = [{}, {"eight_bit": True}, {"master_weights": True}]
    for level, dtype in itertools.product(extension.isas(), (*DTYPES.values(), torch.float64)):
        extension.set_isa(level)
        for form, threads in itertools.product(forms, (1, 3)):
            torch.set_num_threads(threads)
            for make in (
                AdamW,
                lambda p, **o: Adam(p, weight_decay=0.1, **o),
                lambda p, **o: SGD(p, momentum=0.9, **o),
            ):
                params = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
                optimizer = make(params, **form)
                for _ in range(2):
                    for p in params:
                        p.grad = torch.randn_like(p)
                    optimizer.step_checked(clip_norm=1.0)
        part = torch.randn(70, 131).bfloat16()  # of a wider tensor: runs, rows, random bits
        fused_sgd(
            [part],
            [torch.randn_like(part)],
            lr=0.1,
            streams=[1],
            places=[(1003, 131, 999)],
        )


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, IndexError) as error:
        return str(error)
    return ""


def run_broken_storage() -> None:
    """Refused by the kernels themselves, whatever is wrong, before anything is read through it."""
    refused = 0

    def run(level: str, m: int, n: int, k: int) -> None:
        nonlocal refused
        if not m or not n or not k:
            return
        for pattern in ("1x1", "16x1"):
            good = sparse(n, k, pattern, torch.float32)
            for name, at, value in (
                ("ptr", -1, 1 << 30),
                ("ptr", 0, -7),
                ("ptr", 1, 1 << 30),
                ("index", 0, 255),
                ("index", -1, 64),
                ("rows", 0, 255),
                ("rows", -1, 64),
                ("length", 0, 255),
            ):
                tensor = getattr(good, name).clone()
                if not tensor.numel():
                    continue
                tensor.view(-1)[at] = value
                weight = good.replace(**{name: tensor})
                arguments = (*weight.arguments, None)
                x, g = torch.randn(m, k), torch.randn(m, n)
                for call in (
                    lambda x=x, a=arguments: torch.ops.bigops.sparse_linear(x, *a, None, "none"),
                    lambda x=x, g=g, a=arguments: torch.ops.bigops.sparse_linear_backward(
                        g, x, *a, "gelu", True, True, True
                    ),
                ):
                    said = error_of(call)
                    assert "the storage is broken" in said or name == "length", f"{name}: {said}"
                    refused += bool(said)

    at_every_level(run)
    assert refused > 100


def run_meters() -> None:
    units = {"f32": "portable", "bf16": "avx512bf16", "s8": "avx512vnni"}
    for kind, least in units.items():
        if least in extension.isas():  # others are refused
            extension.peak(kind, 2, 0.01)
    extension.bandwidth(1 << 16, 2, 0.01)


def run_reads_past() -> None:
    past = ctypes.CDLL(sys.argv[1]).bigops_reads_past
    past.argtypes, past.restype = [ctypes.c_void_p, ctypes.c_long], ctypes.c_float
    x = torch.randn(33)
    past(x.data_ptr(), 32)  # the last element: no fault
    print("the last element is read")
    past(x.data_ptr(), 33)


def run_wraps() -> None:
    ctypes.CDLL(sys.argv[1]).bigops_wraps(2**31 - 1)


def run_keeps_strings() -> None:
    x = torch.randn(3)
    for _ in range(10):
        torch.ops.bigops_planted.takes_word(x, "a word")


def check_leaks() -> None:
    """End this process where something is allocated that nothing points to.

    Asked before CPython ends, which drops pointers on its way out, to what it then leaves.
    """
    gc.collect()
    if ctypes.CDLL(None).__lsan_do_recoverable_leak_check():
        os._exit(1)


torch.manual_seed(0)
globals()[f"run_{sys.argv[2]}"]()
check_leaks()
print(f"{sys.argv[2]}: done", flush=True)
os._exit(0)
