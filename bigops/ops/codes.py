"""Words that ops take as numbers: a word's position in the table of its argument is its code.

torch's stable ABI never frees the copy that it makes of a string (`ToImpl<std::string>` of torch
2.10 to 2.14: 48 bytes for each string of each call), so that no kernel takes one: `library.define`
gives an op that is defined with words an overload with their codes, for all but direct callers.

The tables are append-only: a saved program holds codes. csrc/common/codes.h has those that C++
kernels read, kernels/common/activation.py the activations.
"""

from __future__ import annotations

from bigops.ops import activation as act

TABLES: dict[str, tuple[str, ...]] = {
    "activation": act.NAMES,
    "activations": ("none", "dynamic", "symmetric", "static"),  # what a product does with x
    "scales": ("tensor", "row", "block"),  # of fp8
    "reduction": ("none", "mean", "sum"),  # of losses
    "choice": ("given", "largest"),  # what a 2:4 pack keeps
    "dtype": ("bf16", "f16"),  # of a 2:4 pack
    "kind": ("layer", "rms"),  # of a norm
}
CODES = {
    argument: {word: code for code, word in enumerate(words)} for argument, words in TABLES.items()
}


def word_of(argument: str, code: int) -> str:
    """The word of a code.

    Raises:
        ValueError: a code that ``argument`` has not.
    """
    words = TABLES[argument]
    if not 0 <= code < len(words):
        raise ValueError(
            f"{argument}: expected a code from 0 to {len(words) - 1} ({words[0]} to {words[-1]}); "
            f"got {code}"
        )
    return words[code]


def code_of(argument: str, word: str) -> int:
    """The code of a word.

    Raises:
        ValueError: a word that ``argument`` has not.
    """
    try:
        return CODES[argument][word]
    except KeyError:
        words = ", ".join(TABLES[argument])
        raise ValueError(f"{argument}: expected one of {words}; got {word!r}") from None
