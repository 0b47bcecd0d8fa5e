"""Windows of token files, and documents packed into rows."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from bigops.train import Sampler
from bigops.train.data import (
    IGNORED,
    Loader,
    Packed,
    TokenFile,
    block_mask,
    cu_seqlens,
    split_documents,
)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_windows_of_a_file(dtype: str, tmp_path: Path) -> None:
    tokens = np.arange(60_000, 60_023).astype(dtype)
    tokens.tofile(tmp_path / "t.bin")
    data = TokenFile(tmp_path / "t.bin", 5, dtype=dtype)
    assert len(data) == 4  # 20 inputs and a target behind; two tokens are left
    x, y = data[3]
    assert x.dtype == torch.int64
    assert x.tolist() == list(range(60_015, 60_020))
    assert torch.equal(y, x + 1)
    assert len(TokenFile(tmp_path / "t.bin", 5, dtype=dtype, stride=2)) == 9
    np.save(tmp_path / "t.npy", tokens)
    assert torch.equal(TokenFile(tmp_path / "t.npy", 5).take([1, 3])[0][1], x)
    held = TokenFile(tmp_path / "t.npy", 5, validation_split=0.25, subset="validation")
    assert [row.tolist() for row in held.take([0])[0]] == [list(range(60_000, 60_005))]
    assert len(pickle.dumps(data)) < 1000  # a worker maps the file by itself
    seen = [x for x, _ in Loader(data, Sampler(4, 2), num_workers=1)]
    assert torch.cat(seen).unique().numel() == 20


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "odd": (lambda p: TokenFile(p / "odd", 2), "odd: expected whole uint16 numbers; got 3 bytes"),
    "short": (lambda p: TokenFile(p / "one", 1), r"one: expected at least .*= 2 tokens; got 1"),
    "floats": (lambda p: TokenFile(p / "f.npy", 1), "f.npy: expected whole numbers in one dim"),
    "no npy": (lambda p: TokenFile(p / "x.npy", 1), "x.npy: expected a .npy file of tokens"),
    "dtype": (lambda p: TokenFile(p / "odd", 1, dtype="int8"), "dtype: expected one of uint16"),
    "window": (lambda p: TokenFile(p / "odd", 0), "window, stride: expected at least 1; got 0"),
    "vocabulary": (
        lambda p: TokenFile(p / "three", 2, vocab_size=8)[0],
        "three: expected tokens below vocab_size, 8; got 9 at 1",
    ),
    "length": (lambda p: Packed([[1]], 0), "length: expected at least 1; got 0"),
    "nothing": (lambda p: Packed([[], []], 4), "documents: expected tokens; got none in 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(case: str, tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"abc")
    (tmp_path / "x.npy").write_bytes(b"abc")
    np.array([1], np.uint16).tofile(tmp_path / "one")
    np.array([1, 9, 2], np.uint16).tofile(tmp_path / "three")
    np.save(tmp_path / "f.npy", np.zeros(3))
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


# --- packing --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 23), min_size=1, max_size=12), st.integers(1, 9))
def test_every_token_is_in_one_place(sizes: list[int], length: int) -> None:
    begins = np.cumsum([0, *sizes])
    documents = [np.arange(b, b + s) + 1 for b, s in zip(begins, sizes, strict=False)]
    if not sum(sizes):
        return
    packed = Packed(documents, length)
    rows = [packed[i] for i in range(len(packed))]
    ids, targets, owners = (
        torch.stack([row[name] for row in rows])
        for name in ("input_ids", "targets", "document_ids")
    )
    real = owners >= 0
    assert sorted(ids[real].tolist()) == list(range(1, sum(sizes) + 1))
    assert packed.filled == real.sum() / real.numel()
    assert not ids[~real].any()
    assert (targets[~real] == IGNORED).all()
    last = {int(end) for end, size in zip(begins[1:], sizes, strict=True) if size}
    expected = torch.where(
        torch.tensor([i in last for i in ids.flatten().tolist()]), IGNORED, ids.flatten() + 1
    ).reshape(ids.shape)  # also across a cut
    assert torch.equal(targets[real], expected[real])
    for row in rows:
        for owner in row["document_ids"].unique().tolist():
            mine = row["position_ids"][row["document_ids"] == owner]
            assert owner < 0 or mine.tolist() == list(range(len(mine)))
    full = [-(-size // length) for size in sizes]
    assert len(rows) <= sum(full)  # a row for each piece at most
    pieces = sum(min(size, length) for size in sizes)
    assert len(rows) >= -(-pieces // length)


def test_the_best_fit_is_taken() -> None:
    packed = Packed([[1] * 6, [2] * 5, [3] * 5, [4] * 4, [5, 6]], 10)
    assert len(packed) == 3
    assert packed[0]["input_ids"].tolist() == [1] * 6 + [4] * 4
    assert packed[1]["input_ids"].tolist() == [2] * 5 + [3] * 5
    assert packed[2]["targets"].tolist()[:2] == [6, IGNORED]


def test_attention_does_not_cross_documents() -> None:
    """Packed rows through attention, by mask and by lengths, are the documents one by one."""
    torch.manual_seed(0)
    documents = [torch.randint(1, 50, (size,)).tolist() for size in (7, 3, 5, 4)]
    packed = Packed(documents, 12)
    table = nn.Embedding(51, 8, dtype=torch.float64)
    places = nn.Embedding(12, 8, dtype=torch.float64)

    def attend(ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        x = (table(ids) + places(positions))[:, None]
        return F.scaled_dot_product_attention(x, x, x, mask, is_causal=mask is None)[:, 0]

    batch = [packed[i] for i in range(len(packed))]
    ids, positions, owners = (
        torch.stack([row[name] for row in batch])
        for name in ("input_ids", "position_ids", "document_ids")
    )
    together = attend(ids, positions, block_mask(owners))
    assert together.isfinite().all()
    bounds, longest = cu_seqlens(owners)
    assert bounds.dtype == torch.int32
    assert bounds[-1] == ids.numel()
    assert longest == bounds.diff().max()
    found = []
    for begin, end in zip(bounds.tolist(), bounds[1:].tolist(), strict=False):
        own = ids.flatten()[begin:end]
        alone = attend(own[None], torch.arange(end - begin)[None], None)[0]
        if owners.flatten()[begin] >= 0:
            assert (together.flatten(0, 1)[begin:end] - alone).abs().max() < 1e-12
            found.append(own.tolist())
    assert sorted(found) == sorted(documents)
    crossed = attend(ids, positions, block_mask(torch.zeros_like(owners)))
    assert (crossed - together).abs().max() > 1e-3


def test_documents_of_a_file() -> None:
    tokens = np.array([5, 6, 0, 7, 0, 0, 8], np.uint16)
    parts = [document.tolist() for document in split_documents(tokens, 0)]
    assert parts == [[5, 6, 0], [7, 0], [0], [8]]
    assert [d.tolist() for d in split_documents(tokens[:3], 0)] == [[5, 6, 0]]
