"""Compression: configs, the verb, the receipt, one file."""

from bigops.compress.apply import compress_, freeze_
from bigops.compress.config import Int8, Sparse, SparseInt8
from bigops.compress.receipt import FloorBreached, Floors, Receipt
from bigops.compress.store import FormatError, load, save

__all__ = [
    "FloorBreached",
    "Floors",
    "FormatError",
    "Int8",
    "Receipt",
    "Sparse",
    "SparseInt8",
    "compress_",
    "freeze_",
    "load",
    "save",
]
