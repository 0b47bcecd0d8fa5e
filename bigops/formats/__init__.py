"""How a weight is stored: one file for each format."""

from bigops.formats.base import Format
from bigops.formats.bitmap import BitmapWeight
from bigops.formats.fp8 import Fp8Weight
from bigops.formats.low_rank import LowRankWeight
from bigops.formats.packed import PackedWeight
from bigops.formats.patterns import Pattern
from bigops.formats.quantized import QuantizedWeight
from bigops.formats.sparse import SparseWeight
from bigops.formats.sparse24 import Sparse24Weight

__all__ = [
    "BitmapWeight",
    "Format",
    "Fp8Weight",
    "LowRankWeight",
    "PackedWeight",
    "Pattern",
    "QuantizedWeight",
    "Sparse24Weight",
    "SparseWeight",
]
