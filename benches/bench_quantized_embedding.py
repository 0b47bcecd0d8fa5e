"""quantized_embedding against torch's look-up in a float table and in one of int8 rows.

What is gained is bytes: a quarter or an eighth of the table. The storage is that of
`quantized_linear`, so that a tied head shares it, and of each of its lines of 64 bytes one row has
4: more of the table passes through the caches than with rows that lie by themselves. The plain int8
side shows what that costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops.benches import rivals
from bigops.benches.harness import DTYPES, OWN, Case, Side
from bigops.benches.limits import Cost
from bigops.formats.quantized import QuantizedWeight

TABLES = ((30522, 384), (32000, 2048))  # (N, K): MiniLM, a Llama type
IDS = (1, 128, 2048)
FORMS = {"int8": (8, None), "int4": (4, 64)}  # bits, group


def cases() -> list[Case]:
    """A tiny table; two tables by three numbers of ids in int8 and int4."""
    tiny = {"form": "int8"}
    found = [Case("quantized_embedding", "overhead", 8, 8, 8, "fp32", params=tiny, quick=True)]
    for form in FORMS:
        for n, k in TABLES:
            for m in IDS:
                found.append(
                    Case(
                        "quantized_embedding",
                        form,
                        m,
                        k,
                        n,
                        "fp32",
                        params={"form": form},
                        quick=(m, k, form) == (128, 384, "int8"),
                    )
                )
    return found


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    dtype, (bits, group) = DTYPES[case.dtype], FORMS[str(case.params["form"])]
    table = torch.randn(case.n, case.k, device=device)
    stored = QuantizedWeight.from_dense(table, bits, group, activations="none")
    table = table.to(dtype)
    rows = QuantizedWeight.from_dense(table, 8, None, activations="none").codes()
    q, scale = rows.q.to(torch.int8), rows.scale
    ids = torch.randint(0, case.n, (case.m,), device=device)
    written = float(case.m * case.k * table.element_size())

    def cost(bits_read: int) -> Cost:
        return Cost(case.dtype, float(case.m * case.k), written + case.m * case.k * bits_read / 8)

    def plain(i: Tensor, codes: Tensor, by: Tensor) -> Tensor:
        return (codes[i].float() * by[i]).to(dtype)

    whole = stored.to_dense(torch.float64).cpu()[ids.cpu()]
    int8 = [(q.double() * scale.double()).cpu()[ids.cpu()]]
    given = [table.double().cpu()[ids.cpu()]]
    full = cost(8 * table.element_size())
    sides = [
        Side(OWN, lambda: bigops.quantized_embedding(ids, stored, dtype), cost(bits)),
        Side("eager", lambda: F.embedding(ids, table), full, "aten", reference=given),
        Side("int8 rows", lambda: plain(ids, q, scale), cost(8), "aten", reference=int8),
        dataclasses.replace(
            rivals.compiled_side(plain, lambda f: f(ids, q, scale), cost(8)), reference=int8
        ),
    ]
    return [whole], sides


def test_quantized_embedding(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
