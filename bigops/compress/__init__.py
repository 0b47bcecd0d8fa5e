"""Compression: configs, the verb, the receipt, one file."""

from bigops.compress.apply import compress_, freeze_
from bigops.compress.config import (
    W4A8,
    Fp8,
    Int4,
    Int8,
    LowRank,
    LowRankInt8,
    Sparse,
    SparseInt8,
)
from bigops.compress.observers import MSE, MinMax, Observer, Percentile
from bigops.compress.receipt import FloorBreached, Floors, Receipt
from bigops.compress.smooth import smooth_
from bigops.compress.store import load, save
from bigops.files import FormatError

__all__ = [
    "MSE",
    "W4A8",
    "FloorBreached",
    "Floors",
    "FormatError",
    "Fp8",
    "Int4",
    "Int8",
    "LowRank",
    "LowRankInt8",
    "MinMax",
    "Observer",
    "Percentile",
    "Receipt",
    "Sparse",
    "SparseInt8",
    "compress_",
    "freeze_",
    "load",
    "save",
    "smooth_",
]
