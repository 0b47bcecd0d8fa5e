"""Round to nearest: each number of a weight by itself, to the closest that its scale allows."""

from __future__ import annotations

from bigops.formats.base import Format
from bigops.nn.compressed_linear import CompressedLinear


def round_to_nearest(layer: CompressedLinear) -> Format:
    """The storage that `CompressedLinear.freeze` keeps.

    Raises:
        ValueError: NaN or inf in the weight, or static qparams that have seen no input.
    """
    stored: Format = layer.storage()
    return stored
