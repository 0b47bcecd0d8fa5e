"""A folder of images for each class."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bigops.train.data.packed import IGNORED
from bigops.train.data.subset import part

_MODES = {"L": 1, "RGB": 3, "RGBA": 4}
_CLASS_MODES = ("sparse", "categorical", "binary", "input", None)
_RESAMPLING = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


class ImageError(ValueError):
    """An image that does not decode; the message names the file."""


class ImageFolder(Dataset):
    """Images in ``root/<class>/..``, decoded by Pillow where a row is asked for.

    Row i is ``(image, target)``: uint8 [channels, height, width], and what ``class_mode`` says.
    Classes are the folders in the order of their names, images lie at any depth, in the order of
    their paths; files of other kinds are left out.

    Args:
        root: the folder.
        size: (height, width) to which images are resized, None where they have one size already.
        mode: "RGB", "L" or "RGBA", to which they are converted.
        resample: "nearest", "bilinear", "bicubic", "lanczos", "box" or "hamming".
        class_mode: as Keras has it: "sparse" for the class, int64; "categorical" for one of
            ``classes`` numbers being 1, float32; "binary" for 0 or 1, float32; "input" for the
            image itself; None for images alone.
        broken: what becomes of an image that does not decode. "refuse" raises; "skip" warns, and
            gives zeros with the target `IGNORED` of cross_entropy (categorical: zeros, binary:
            NaN), so that the batch keeps its size on every rank; it needs ``size``.
        validation_split, subset: of each class the validation part is the first images.

    Attributes:
        classes: their names.
        files, targets: of the rows: paths and numbers of classes.

    Raises:
        ImportError: Pillow is not there.
        ValueError: an argument out of range, no class folders, or one without images; it is named.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        size: tuple[int, int] | None = None,
        mode: str = "RGB",
        resample: str = "bilinear",
        class_mode: str | None = "sparse",
        broken: str = "refuse",
        validation_split: float = 0.0,
        subset: str | None = None,
    ) -> None:
        for name, value, allowed in (
            ("mode", mode, tuple(_MODES)),
            ("resample", resample, _RESAMPLING),
            ("class_mode", class_mode, _CLASS_MODES),
            ("broken", broken, ("refuse", "skip")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}; got {value!r}")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size: expected (height, width) from 1 on; got {size}")
        if broken == "skip" and size is None:
            raise ValueError("size: expected one with broken='skip': a broken image has none")
        kinds = set(_pillow().registered_extensions())
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"root: expected a folder of class folders; got {root}")
        folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
        if not folders:
            raise ValueError(f"root: expected a folder for each class; got none in {root}")
        self.classes = [folder.name for folder in folders]
        if class_mode == "binary" and len(folders) != 2:
            raise ValueError(f"class_mode: expected two classes for 'binary'; got {self.classes}")
        self.size, self.mode, self.resample = size, mode, resample
        self.class_mode, self.broken = class_mode, broken
        self.files: list[Path] = []
        self.targets: list[int] = []
        for number, folder in enumerate(folders):
            found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in kinds)
            if not found:
                raise ValueError(f"{folder}: expected images of this class; got none")
            rows = part(len(found), validation_split, subset)
            self.files += found[rows.start : rows.stop]
            self.targets += [number] * len(rows)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Any:
        """
        Raises:
            ImageError: the image does not decode, unless broken images are skipped.
        """
        target = self.targets[row]
        try:
            image = self._decoded(self.files[row])
        except ImageError as error:
            if self.broken == "refuse" or self.size is None:
                raise
            warnings.warn(f"skipped: {error}", stacklevel=2)
            shape = _MODES[self.mode], *self.size
            image, target = torch.zeros(shape, dtype=torch.uint8, device="cpu"), IGNORED
        return image if self.class_mode is None else (image, self._target(image, target))

    def _target(self, image: Tensor, target: int) -> Tensor:
        if self.class_mode == "input":
            return image
        if self.class_mode == "sparse":
            return torch.tensor(target, device="cpu")
        if self.class_mode == "binary":
            value = float("nan") if target == IGNORED else float(target)
            return torch.tensor(value, dtype=torch.float32, device="cpu")
        return (torch.arange(len(self.classes), device="cpu") == target).to(torch.float32)

    def _decoded(self, file: Path) -> Tensor:
        pillow = _pillow()
        try:
            with pillow.open(file) as image:
                image = image.convert(self.mode)
                if self.size is not None and image.size != self.size[::-1]:
                    way = pillow.Resampling[self.resample.upper()]
                    image = image.resize(self.size[::-1], way)
                pixels = np.array(image)
        except FileNotFoundError:
            raise
        except Exception as error:  # decoders raise nearly anything
            raise ImageError(
                f"{file}: expected an image that Pillow decodes; got "
                f"{type(error).__name__}: {error}"
            ) from error
        channels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(channels))


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("images need Pillow: pip install 'bigops[data]'") from None
    Image.init()
    return Image
