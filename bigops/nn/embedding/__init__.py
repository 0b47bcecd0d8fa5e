"""Embeddings in the storage of linear layers."""

from bigops.nn.embedding.quant_embedding import QuantEmbedding, why_not

__all__ = ["QuantEmbedding", "why_not"]
