"""MultiheadAttention: `nn.MultiheadAttention` whose projections are layers that are called.

torch's reads the weights of its projections and calls neither, so that no other layer can take
their place. Here both are called, whatever they are: dense, compressed or adapted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from bigops.nn.compressed_linear import CompressedLinear
from bigops.nn.computed_weight import is_dense
from bigops.nn.fields import FLAG, NUMBER, SIZE

# Entries of a `state_dict` as torch's layer has them, and where they are here.
_KEYS = {"in_proj_weight": "in_proj.weight", "in_proj_bias": "in_proj.bias"}


class MultiheadAttention(nn.MultiheadAttention):
    """Self- or cross-attention as torch's, by two linear layers ``in_proj`` and ``out_proj``.

    An `nn.MultiheadAttention` by type, called as that is. In `state_dict` it has that one's keys as
    long as ``in_proj`` has a weight (``in_proj_weight``, ``in_proj_bias``); of a compressed one
    the layer's own ("in_proj.values", "in_proj.bias").

    ``in_proj`` gives queries, keys and values in one product; where they come from different
    tensors each third of its rows is a product by itself.

    The fast path of torch's layers, which reads the weights, is never taken, and
    `nn.TransformerEncoderLayer` around one takes none either.

    Args:
        embed_dim: E; queries, keys and values have it all.
        num_heads: H, a divisor of E.
        dropout: of the attention weights, in training.
        bias: whether both projections have one.
        batch_first: whether tensors are [B, L, E]; else [L, B, E].
        device, dtype: of the projections.

    Shapes, dtypes and masks: those of `nn.MultiheadAttention`. A nested tensor (self-attention
    without masks) is padded, and the result is nested again.

    Raises:
        ValueError: a size below 1, or heads that do not divide ``embed_dim``.
    """

    FIELDS = {  # noqa: RUF012
        "embed_dim": SIZE,
        "num_heads": SIZE,
        "dropout": NUMBER,
        "bias": FLAG,
        "batch_first": FLAG,
    }
    parts = {"in_proj": "torch.Linear", "out_proj": "torch.Linear"}  # noqa: RUF012
    calls_projections = True  # so that other layers can take their place
    # What fast paths ask for: weights that they may read.
    _qkv_same_embed_dim = False
    add_zero_attn = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                "embed_dim, num_heads: expected at least 1 and heads that divide it; got "
                f"{embed_dim}, {num_heads}"
            )
        nn.Module.__init__(self)  # torch's has weights of its own
        self.embed_dim = self.kdim = self.vdim = embed_dim
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.dropout, self.batch_first = dropout, batch_first
        self.bias_k = self.bias_v = None
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim, bias, device=device, dtype=dtype)
        self.out_proj: Any = nn.Linear(embed_dim, embed_dim, bias, device=device, dtype=dtype)
        with torch.no_grad():
            nn.init.xavier_uniform_(self.in_proj.weight)
            for layer in (self.in_proj, self.out_proj) if bias else ():
                layer.bias.zero_()

    @classmethod
    def from_torch(cls, attention: nn.MultiheadAttention) -> Self:
        """A layer that shares the Parameter objects of ``attention``.

        Raises:
            ValueError: one that has more than two projections (`why_not`).
        """
        if reason := why_not(attention):
            raise ValueError(f"attention: expected one with two projections; {reason}")
        sizes = attention.embed_dim, attention.num_heads, attention.dropout
        bias = attention.in_proj_bias is not None
        new = cls(*sizes, bias=bias, batch_first=attention.batch_first, device="meta")
        new.in_proj.weight = attention.in_proj_weight  # type: ignore[assignment]
        new.in_proj.bias = attention.in_proj_bias  # type: ignore[assignment]
        new.out_proj.weight, new.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias
        return new.train(attention.training)

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> Self:
        """An empty layer on "meta" as `arguments` describes it, to be loaded."""
        return cls(**arguments, device="meta")

    def arguments(self) -> dict[str, Any]:
        """What `from_arguments` needs to make this layer again, as plain data."""
        return {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "dropout": self.dropout,
            "bias": self.in_proj.bias is not None,
            "batch_first": self.batch_first,
        }

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        """[3E, E]: that of ``in_proj``, for hosts that read it."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """[3E]."""
        return self.in_proj.bias

    # --- state_dict ---------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        whole = prefix + "in_proj.weight" in found  # else it is a layer with keys of its own
        for theirs, ours in _KEYS.items() if whole else ():
            if prefix + ours in found:
                found[prefix + theirs] = found.pop(prefix + ours)
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for theirs, ours in _KEYS.items():  # before the projections are given theirs
            if prefix + theirs in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # --- forward ------------------------------------------------------------------------------

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested:
            return self._nested(query, key, value, key_padding_mask, attn_mask, need_weights), None
        batched, same = query.dim() == 3, query is key and key is value
        padding = F._canonical_mask(
            key_padding_mask,
            "key_padding_mask",
            F._none_or_dtype(attn_mask),
            "attn_mask",
            query.dtype,
        )
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: expected a mask beside the hint is_causal; got None")
        causal = is_causal and padding is None and not need_weights
        mask = None
        if not causal:
            mask = F._canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, False)
        given = [query] if same else [query, key, value]
        if not batched:
            given = [x.unsqueeze(0) for x in given]
            padding = None if padding is None else padding.unsqueeze(0)
        elif not self.batch_first:
            given = [x.transpose(0, 1) for x in given]
        q, k, v = (self._heads(x) for x in self._projected(*given))  # [B, H, L, E / H]
        bias = self._bias(mask, padding, q.shape[0])
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.dropout((scores if bias is None else scores + bias).softmax(-1), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = attend(q, k, v, bias, dropout, causal)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _projected(self, query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, [B, L, E] each."""
        if not others:
            return self.in_proj(query).chunk(3, -1)  # type: ignore[no-any-return]
        return tuple(self._third(x, i) for i, x in enumerate((query, *others)))

    def _third(self, x: Tensor, i: int) -> Tensor:
        """x by one third of the rows of ``in_proj``."""
        layer: Any = self.in_proj
        if layer._forward_pre_hooks or layer._forward_hooks:  # which are to see the call
            return layer(x).chunk(3, -1)[i]  # type: ignore[no-any-return]
        bias = None if layer.bias is None else layer.bias.chunk(3)[i]
        if is_dense(layer):
            return F.linear(x, layer.weight.chunk(3)[i], bias)
        if isinstance(layer, CompressedLinear) and layer.frozen and not layer.unpacks:
            storage = layer.storage()
            if storage.splits(3):
                part = storage.shard(i, 3)
                return layer.op.run(x, part.arguments, self.embed_dim, bias)
        return layer(x).chunk(3, -1)[i]  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _bias(self, mask: Tensor | None, padding: Tensor | None, batch: int) -> Tensor | None:
        """What is added to the scores: masks [L, S] or [B H, L, S], padding [B, S]."""
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (batch, self.num_heads))
        if padding is None:
            return mask
        hidden = padding[:, None, None, :]
        return hidden if mask is None else mask + hidden

    def _nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        need_weights: bool,
    ) -> Tensor:
        """Self-attention over rows of several lengths, as `nn.TransformerEncoder` hands them on."""
        masked = key_padding_mask is not None or attn_mask is not None
        if query is not key or key is not value or masked or need_weights or not self.batch_first:
            raise ValueError(
                "query: expected a dense tensor, or a nested one that is key and value, too, with "
                "batch_first, without masks and weights"
            )
        lengths = torch.tensor([row.shape[0] for row in query.unbind()], device=query.device)
        x = query.to_padded_tensor(0.0)
        there = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        y, _ = self.forward(x, x, x, key_padding_mask=~there, need_weights=False)
        return torch._nested_tensor_from_mask(y, there, mask_check=False)  # type: ignore[no-any-return]


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float, causal: bool
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v; [B, H, L, d]."""
    return F.scaled_dot_product_attention(q, k, v, bias, dropout, causal)


def why_not(attention: nn.MultiheadAttention) -> str | None:
    """Why an attention is more than two projections around a softmax, or None."""
    if not attention._qkv_same_embed_dim:
        return "its keys or values have a width of their own"
    if attention.bias_k is not None or attention.bias_v is not None:
        return "it adds a row to keys and values (add_bias_kv)"
    if attention.add_zero_attn:
        return "it adds a row of zeros to keys and values (add_zero_attn)"
    return None
