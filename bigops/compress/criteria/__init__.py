"""Which entries of a weight stay: one file for each criterion.

A criterion is a function ``(weight, pattern, sparsity) -> mask`` (`bigops.formats.patterns`), with
one bool a block of the pattern. One that needs more, such as the inputs of the layer, is made for
that layer by a function of its own. `SparseLinear.from_linear` takes it, what it chose is stored by
`SparseWeight.from_mask`. `magnitude` stands below, for layers choose by it where nobody says.
"""

from bigops.formats.patterns import Criterion, magnitude

__all__ = ["Criterion", "magnitude"]
