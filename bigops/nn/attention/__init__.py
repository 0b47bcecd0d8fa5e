"""Attention of torch's own layers over projections that verbs may swap."""

from bigops.nn.attention.multihead_attention import MultiheadAttention, why_not

__all__ = ["MultiheadAttention", "why_not"]
