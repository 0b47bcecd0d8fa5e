"""Training and validation parts of a data set, as Keras takes them."""

from __future__ import annotations


def part(rows: int, validation_split: float, subset: str | None) -> range:
    """The rows of a part: validation has the first ``int(validation_split * rows)``.

    Args:
        rows: how many there are.
        validation_split: share of the validation part, in [0, 1).
        subset: "training", "validation", or None for all rows.

    Raises:
        ValueError: an argument out of range, or a part without rows.
    """
    if not 0 <= validation_split < 1:
        raise ValueError(f"validation_split: expected 0 to below 1; got {validation_split}")
    if subset not in (None, "training", "validation"):
        raise ValueError(f"subset: expected 'training', 'validation' or None; got {subset!r}")
    cut = int(validation_split * rows)
    found = {None: range(rows), "training": range(cut, rows), "validation": range(cut)}[subset]
    if not found:
        raise ValueError(
            f"subset: expected rows in {subset!r}; got none of {rows} with validation_split "
            f"{validation_split}"
        )
    return found
