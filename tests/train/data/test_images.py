"""ImageFolder: classes and order, values of Pillow, what becomes of an image that is none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigops.train import Sampler
from bigops.train.data import IGNORED, ImageError, ImageFolder, Loader

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name, count in (("cats", 4), ("dogs", 3)):
        folder = tmp_path / name / "deep" if name == "dogs" else tmp_path / name
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / "notes.txt").write_text("no image")
    return tmp_path


def test_rows_are_classes_in_order(root: Path) -> None:
    data = ImageFolder(root)
    assert data.classes == ["cats", "dogs"]
    assert data.targets == [0, 0, 0, 0, 1, 1, 1]
    assert [file.name for file in data.files[:4]] == ["0.png", "1.png", "2.png", "3.png"]
    image, target = data[5]
    assert target.dtype == torch.int64
    assert target == 1
    pixels = np.array(Image.open(root / "dogs" / "deep" / "1.png"))
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


def test_sizes_modes_and_targets(root: Path) -> None:
    image, target = ImageFolder(root, size=(5, 3), mode="L", class_mode="categorical")[0]
    source = Image.open(root / "cats" / "0.png").convert("L")
    resized = source.resize((3, 5), Image.Resampling.BILINEAR)
    assert torch.equal(image, torch.from_numpy(np.array(resized))[None])
    assert target.tolist() == [1.0, 0.0]
    assert ImageFolder(root, class_mode="binary")[6][1] == 1.0
    assert ImageFolder(root, mode="RGBA", class_mode=None)[0].shape == (4, 6, 8)
    image, target = ImageFolder(root, class_mode="input")[0]
    assert image is target


def test_validation_is_the_first_part_of_each_class(root: Path) -> None:
    options: dict[str, Any] = {"validation_split": 0.4}
    held = ImageFolder(root, subset="validation", **options)
    rest = ImageFolder(root, subset="training", **options)
    assert [file.name for file in held.files] == ["0.png", "0.png"]
    assert Counter(rest.targets) == {0: 3, 1: 2}
    assert sorted(held.files + rest.files) == sorted(ImageFolder(root).files)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_refused_or_skipped(root: Path, workers: int) -> None:
    broken = root / "cats" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    loader = Loader(ImageFolder(root), Sampler(7, 3), num_workers=workers)
    with pytest.raises(ImageError, match="2.png: expected an image that Pillow decodes; got "):
        list(loader)
    data = ImageFolder(root, size=(6, 8), broken="skip")
    with pytest.warns(UserWarning, match="skipped: .*2.png"):
        image, target = data[2]
    assert not image.any()
    assert target == IGNORED
    logits = torch.randn(2, 2)
    targets = torch.stack([target, torch.tensor(1)])
    loss = torch.nn.functional.cross_entropy(logits, targets)
    assert loss == torch.nn.functional.cross_entropy(logits[1:], targets[1:])
    kinds = {"categorical": [0.0, 0.0], "binary": float("nan")}
    for kind, expected in kinds.items():
        with pytest.warns(UserWarning, match="skipped"):
            found = ImageFolder(root, size=(6, 8), broken="skip", class_mode=kind)[2][1]
        assert repr(found.tolist()) == repr(expected)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "mode": ({"mode": "CMYK"}, r"mode: expected one of .*; got 'CMYK'"),
    "class_mode": ({"class_mode": "raw"}, "class_mode: expected one of"),
    "broken": ({"broken": "ignore"}, "broken: expected one of"),
    "size": ({"size": (0, 3)}, r"size: expected \(height, width\) from 1 on"),
    "no size": ({"broken": "skip"}, "size: expected one with broken='skip'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str, root: Path) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        ImageFolder(root, **options)


def test_folders_without_images_are_named(root: Path) -> None:
    (root / "birds").mkdir()
    (root / "birds" / "list.txt").write_text("no image")
    with pytest.raises(ValueError, match="birds: expected images of this class; got none"):
        ImageFolder(root)
    with pytest.raises(ValueError, match="root: expected a folder for each class; got none"):
        ImageFolder(root / "cats")
    with pytest.raises(ValueError, match="root: expected a folder of class folders"):
        ImageFolder(root / "none")
    with pytest.raises(ValueError, match="class_mode: expected two classes for 'binary'"):
        ImageFolder(root, class_mode="binary")


def test_without_pillow_the_extra_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'bigops\[data\]'"):
        ImageFolder(root)
