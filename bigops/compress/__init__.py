"""Compression: configs, the verb, the receipt, one file."""

from bigops.compress.apply import compress_, freeze_
from bigops.compress.config import Int8, Sparse, SparseInt8

__all__ = ["Int8", "Sparse", "SparseInt8", "compress_", "freeze_"]
