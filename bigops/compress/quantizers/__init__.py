"""Which numbers of a format stand for a weight: one file for each quantiser.

A quantiser is a function of a layer in recovery state that gives its storage, in the format and
form that the layer has. One that chooses the codes itself stores them by `Format.from_codes`, which
rounds nothing anew; one that needs more, such as the inputs of the layer, is made for that layer by
a function of its own.
"""

from collections.abc import Callable
from typing import Any

from bigops.compress.quantizers.round_to_nearest import round_to_nearest
from bigops.formats.base import Format

Quantizer = Callable[[Any], Format]

__all__ = ["Quantizer", "round_to_nearest"]
