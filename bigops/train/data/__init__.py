"""Data sets, loaders and augmentation whose every random number is keyed by (seed, epoch, row)."""

from bigops.train.data.arrays import Arrays
from bigops.train.data.augment import Augment
from bigops.train.data.images import ImageError, ImageFolder
from bigops.train.data.loader import Loader
from bigops.train.data.packed import IGNORED, Packed, block_mask, cu_seqlens
from bigops.train.data.tokens import TokenFile, split_documents

__all__ = [
    "IGNORED",
    "Arrays",
    "Augment",
    "ImageError",
    "ImageFolder",
    "Loader",
    "Packed",
    "TokenFile",
    "block_mask",
    "cu_seqlens",
    "split_documents",
]
