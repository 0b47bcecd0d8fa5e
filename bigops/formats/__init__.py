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

FORMATS: tuple[type[Format], ...] = (
    BitmapWeight,
    Fp8Weight,
    LowRankWeight,
    PackedWeight,
    QuantizedWeight,
    SparseWeight,
    Sparse24Weight,
)


def named(name: str) -> type[Format]:
    """The format of a name; raise ValueError for one that is not in `FORMATS`."""
    found = {form.__name__: form for form in FORMATS}
    if name not in found:
        raise ValueError(f"format: expected one of {', '.join(found)}; got {name!r}")
    return found[name]


__all__ = [
    "FORMATS",
    "BitmapWeight",
    "Format",
    "Fp8Weight",
    "LowRankWeight",
    "PackedWeight",
    "Pattern",
    "QuantizedWeight",
    "Sparse24Weight",
    "SparseWeight",
    "named",
]
