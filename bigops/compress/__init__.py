"""Compression: configs, the verb, one file."""

from bigops.compress.apply import compress_, freeze_
from bigops.compress.config import Int8, Sparse, SparseInt8
from bigops.compress.store import FormatError, load, save

__all__ = [
    "FormatError",
    "Int8",
    "Sparse",
    "SparseInt8",
    "compress_",
    "freeze_",
    "load",
    "save",
]
