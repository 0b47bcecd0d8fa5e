"""QuantEmbedding: the rows of an embedding in int8 or int4, as `QuantLinear` has its weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from bigops.formats.quantized import QuantizedWeight
from bigops.nn.fields import FLAG, INT, SIZE, Field, left_out, one_of, optional
from bigops.nn.linear import check_size
from bigops.nn.stored_state import StoredMatrix
from bigops.ops.choice import Choice
from bigops.ops.quantized_embedding import explain, run


class QuantEmbedding(StoredMatrix, nn.Embedding):  # type: ignore[misc]  # freeze: bool, in torch
    """``weight[ids]`` with the weight in int8 or int4 (`QuantizedWeight`), by rows.

    An `nn.Embedding` by type: ``weight`` is there in both states, of a frozen layer as a
    `ComputedWeight`. The storage is that of a `QuantLinear` of the same form, so that a head that
    is tied to the embedding has its tensors (`bigops.compress_` does so).

    Recovery state: a float ``weight`` [N, K]; the rows that a call takes are rounded to what will
    be stored, with a straight-through gradient (arXiv 1308.3432). Frozen (`freeze`): the tensors of
    the format, each a `StoredParameter`.

    Args:
        num_embeddings: N.
        embedding_dim: K.
        padding_idx: a row that gets no gradient, zeros at the start; from the end where below 0.
        device, dtype: of the float weight.
        bits, group, symmetric: as `QuantizedWeight.from_dense` takes them.

    Shapes: ids [..], int64 or int32; result [.., K] in the dtype of the float weight, of a frozen
    layer float32, bfloat16 or float16.

    Raises:
        ValueError: a size below 0, a form that is not there, or a ``padding_idx`` outside.
        IndexError: of a call, an id that names no row.
    """

    FIELDS: ClassVar[dict[str, Field]] = {
        "num_embeddings": SIZE,
        "embedding_dim": SIZE,
        "padding_idx": optional(INT),
        "frozen": FLAG,
        "dtype": left_out(one_of("bfloat16", "float16", "float64")),
        "bits": SIZE,
        "group": optional(SIZE),
        "symmetric": FLAG,
    }
    for_bytes = True
    # of nn.Embedding, which the storage cannot follow: see `why_not`
    max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False
    padding_idx: int | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bits: int = 8,
        group: int | None = None,
        symmetric: bool = True,
    ) -> None:
        n, k = (
            check_size("num_embeddings", num_embeddings),
            check_size("embedding_dim", embedding_dim),
        )
        if padding_idx is not None and not -n <= padding_idx < n:
            raise ValueError(f"padding_idx: expected a row, {-n} to {n - 1}; got {padding_idx}")
        nn.Module.__init__(self)  # the weight may be of another kind
        form = {"bits": bits, "group": group, "symmetric": symmetric, "activations": "none"}
        self._begin(QuantizedWeight, form)
        source = nn.Embedding(n, k, padding_idx, device=device, dtype=dtype)
        self.num_embeddings, self.embedding_dim = n, k
        self.padding_idx = source.padding_idx
        self.weight = source.weight

    @classmethod
    def from_embedding(cls, embedding: nn.Module, **form: Any) -> Self:
        """A layer in recovery state that shares the Parameter object of ``embedding``.

        Args:
            embedding: an `nn.Embedding`, or a layer of this class that is not frozen.
            form: bits, group and symmetric.

        Raises:
            TypeError: another module.
            ValueError: a frozen layer, or settings that a stored weight cannot follow (`why_not`).
        """
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(
                f"embedding: expected a torch.nn.Embedding; got {type(embedding).__name__}"
            )
        if isinstance(embedding, QuantEmbedding) and embedding.frozen:
            raise ValueError("embedding: expected a layer with a float weight; got a frozen one")
        if reason := why_not(embedding):
            raise ValueError(f"embedding: expected one that can be stored; {reason}")
        sizes = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
        new = cls(*sizes, device="meta", **form)
        new.weight = embedding.weight
        return new.train(embedding.training)

    @property
    def matrix_sizes(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        if self.frozen:
            return run(input, self._arguments(), self.float_dtype or torch.float32)
        # Each row is rounded by itself: those that are taken are as they are in the whole matrix.
        rows = F.embedding(input, self.weight, self.padding_idx)
        flat = rows.reshape(input.numel(), self.embedding_dim)
        return self._straight_through(flat).reshape(rows.shape)

    def explain(self, x: Tensor) -> Choice:
        """Which kernel serves the layer on ids."""
        return explain(x, self.storage(), self._weight_like()[0])

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        text = f"{self.num_embeddings}, {self.embedding_dim}{padding}"
        text += ", frozen" if self.frozen else ""
        form = (f", {name}={value}" for name, value in self.form_arguments().items())
        return "".join([text, *form])

    def arguments(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
            "frozen": self.frozen,
            **self._dtype_argument(),
            **self.form_arguments(),
        }

    def form_arguments(self) -> dict[str, Any]:
        # there is no product that could quantise activations
        return {name: value for name, value in self.form.items() if name != "activations"}


def why_not(embedding: nn.Embedding) -> str | None:
    """Why the weight of an embedding cannot be stored for what it does, or None."""
    if embedding.max_norm is not None:
        return "its max_norm writes to the weight in each call"
    if embedding.scale_grad_by_freq or embedding.sparse:
        name = "sparse" if embedding.sparse else "scale_grad_by_freq"
        return f"its {name} is about a gradient that a stored weight has not"
    return None
