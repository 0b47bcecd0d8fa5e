"""Freezing, moving and loading of a layer of compressed storage: it stays whole in each.

Recovery: a float Parameter is trained in the form it will be stored in. Frozen: the storage alone
is left, in parameters that never train (`StoredParameter`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx, nn

from bigops import formats
from bigops.formats import quantize
from bigops.formats.base import Format
from bigops.nn.computed_weight import ComputesWeight
from bigops.nn.layer import Layer
from bigops.nn.stored_parameter import StoredParameter

RETIRED = "y_grid"  # in files of older layers, which gave u8 to the next one
STATES = ("frozen", "thawed", RETIRED)  # in `arguments()`, of no constructor

Self = TypeVar("Self", bound="StoredState")
Matrix = TypeVar("Matrix", bound="StoredMatrix")


def in_todays_names(
    state: dict[str, Any], prefix: str, older: Mapping[str, str | None]
) -> dict[str, Any]:
    """A state_dict whose entries of a layer at ``prefix`` are called as they are today."""
    names = {prefix + old: new for old, new in older.items() if prefix + old in state}
    if not names:
        return state
    kept = {name: value for name, value in state.items() if name not in names}
    renamed = {prefix + new: state[old] for old, new in names.items() if new is not None}
    return {**kept, **renamed}


class StoredState(Layer, ComputesWeight):
    """A layer that keeps the tensors of a `Format`, each a `StoredParameter`, once it is frozen.

    Hosts put plain Parameters in their place (pickle, `.to("meta")`, hooks that offload); the layer
    computes with these too, and makes them what they were whenever it is moved or loaded.
    """

    older_names: ClassVar[Mapping[str, str | None]] = {RETIRED: None, "x_grid": "x_qparams"}
    format: type[Format]
    float_dtype: torch.dtype | None = None  # frozen: of the weight that the storage stands for
    _empty: Format | None  # frozen: the storage without its tensors
    _sizes: tuple[Any, ...]  # and what its op takes after them
    trained_names: tuple[str, ...]  # Parameters of the recovery state

    def _convert(self) -> Format:
        """The storage of the float weight as it is now."""
        raise NotImplementedError

    def empty_storage(self) -> Format:
        """Storage on "meta" of a layer that is to be loaded."""
        raise NotImplementedError

    def check_storage(self, storage: Format) -> None:
        """Raise ValueError or TypeError unless the storage is whole and fits this layer."""
        storage.validate()
        sizes = self.matrix_sizes
        if storage.shape != sizes:
            raise ValueError(
                f"{self.format.TENSORS[0]}: expected a weight of {list(sizes)}; got "
                f"{list(storage.shape)}"
            )

    def freeze(self: Self, storage: Format | None = None) -> Self:
        """Keep only the compressed storage; the float weight goes. In place; twice is once.

        Args:
            storage: what a quantiser made of the layer; None: the weight rounded to nearest.

        Raises:
            ValueError, TypeError: NaN or inf in the weight, or a storage that is broken or of
                another form. The layer stays as it was.
        """
        if self.frozen and not self.thawed:
            return self
        if storage is None:
            storage = self._convert()
        else:
            self._check_form(storage)
            self.check_storage(storage)
        self.set_storage(storage)
        return self

    def _check_form(self, storage: Format) -> None:
        empty = self.empty_storage()
        if type(storage) is not type(empty):
            expected, got = type(empty).__name__, type(storage).__name__
            raise TypeError(f"storage: expected a {expected}; got a {got}")
        form, given = self._sizes_of(empty), self._sizes_of(storage)
        if form != given:
            raise ValueError(f"storage: expected the form of the layer, {form}; got {given}")

    def set_storage(self, storage: Format) -> None:
        """Become frozen with this storage, at once: no half of it is ever seen, nor left behind."""
        tensors = storage.tensors()
        gone = {*self.trained_names, "mask", *tensors}
        parameters = {n: p for n, p in self._parameters.items() if n not in gone}
        parameters.update(
            {n: None if t is None else StoredParameter(t) for n, t in tensors.items()}
        )
        before = self._parameters.get(self.trained_names[0])
        vars(self).update(
            _parameters=parameters,
            float_dtype=self.float_dtype if before is None else before.dtype,
            _buffers={n: t for n, t in self._buffers.items() if n not in gone},
            _empty=storage.with_tensors(dict.fromkeys(tensors)),
            _sizes=self._sizes_of(storage),
            frozen=True,
            thawed=False,
        )

    def _sizes_of(self, storage: Format) -> tuple[Any, ...]:
        return storage.sizes

    def _fixed(self) -> tuple[str, ...]:
        """Names of the storage that is never trained."""
        if not self.frozen:
            return ()
        return tuple(n for n in self.storage_names if not (self.thawed and n == "values"))

    def _keep_fixed(self) -> None:
        """Make the storage that is never trained `StoredParameter` again."""
        for name in self._fixed():
            found = self._parameters.get(name)
            if type(found) is nn.Parameter:
                self._parameters[name] = StoredParameter(found)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and name in self._fixed():
            value = StoredParameter(value)
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_fixed()

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        names = self.storage_names if self.frozen else ()
        storage = [*map(self._parameters.get, names), self._buffers.get("x_qparams")]
        ids = {id(t) for s in storage if s is not None for t in (s, s.grad) if t is not None}

        def move(t: Tensor) -> Tensor:
            new = fn(t)
            if id(t) not in ids:
                return new
            # .half() and channels_last mean the activations: storage keeps its dtype and layout.
            new = new if new.dtype == t.dtype else t.to(new.device)
            return new if new.stride() == t.stride() else new.contiguous()

        if self.frozen and self.float_dtype is not None and storage[0] is not None:
            like = torch.empty(0, dtype=self.float_dtype, device=storage[0].device)
            self.float_dtype = fn(like).dtype
        super()._apply(move, recurse)
        self._keep_fixed()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in () if keep_vars else (prefix + name for name in self._fixed()):
            if type(destination.get(key)) is StoredParameter:
                destination[key] = Tensor.detach(destination[key])

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state_dict = in_todays_names(state_dict, prefix, self.older_names)
        state_dict = self._check_qparams(state_dict, prefix, error_msgs)
        found: set[str] = set()
        if self.frozen:
            found = self._load_storage(state_dict, prefix, local_metadata, error_msgs)
            state_dict = {k: v for k, v in state_dict.items() if k not in found}
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        # A state_dict of nn.Linear has no mask: the layer's own pattern stays.
        missing_keys.extend(key for key in missing if key not in {*found, prefix + "mask"})

    def _check_qparams(
        self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]
    ) -> dict[str, Any]:
        """Refuse ``x_qparams`` that are none; the layer keeps its own then."""
        own, given = self._buffers.get("x_qparams"), state_dict.get(prefix + "x_qparams")
        if own is None or given is None or given.is_meta:
            return state_dict
        if not self.frozen and given.shape == own.shape and not bool(given.any()):
            return state_dict  # not calibrated yet
        try:
            quantize.check_qparams("x_qparams", given)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return {**state_dict, prefix + "x_qparams": own}
        return state_dict

    def _load_storage(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        error_msgs: list[str],
    ) -> set[str]:
        """Take whole, valid storage of whatever size; give the keys that torch need not load."""
        own = {name: self._parameters[name] for name in self.storage_names}
        names = [name for name, t in own.items() if t is not None]
        plain = all(type(own[name]) in (StoredParameter, nn.Parameter) for name in names)
        if not plain or any(prefix + name not in state_dict for name in names):
            return set()  # torch copies shards, and names what is missing
        found: dict[str, Any] = dict.fromkeys(own)
        found.update({name: state_dict[prefix + name].contiguous() for name in names})
        assign = local_metadata.get("assign_to_params_buffers", False)
        try:
            assert self._empty is not None
            self.check_storage(self._empty.with_tensors(found))
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
        else:
            for name in names:
                self._load_tensor(name, Tensor.detach(found[name]), assign)
        return {prefix + name for name in names}

    def _load_tensor(self, name: str, value: Tensor, assign: bool) -> None:
        old = self._parameters[name]
        assert old is not None
        if not assign:
            value = value.to(old.device, copy=True)
        if name in self._fixed() and (assign or old.is_meta or type(old) is not StoredParameter):
            self._parameters[name] = StoredParameter(value)
        elif assign or old.is_meta:  # whose data cannot come from another device
            self._parameters[name] = nn.Parameter(value, old.requires_grad)
        else:
            if old.shape != value.shape:
                old.grad = None
            old.data = value  # optimisers and layers that share it keep the object


class StoredMatrix(StoredState):
    """A layer whose matrix [N, K] lies in one of the formats, in both states.

    ``weight`` is there in each: a Parameter in recovery, a `ComputedWeight` of a frozen layer.
    """

    compressed = freezes = True
    form: dict[str, Any]  # what ``format.from_dense`` takes besides the matrix
    frozen: bool
    weight: Tensor  # a Parameter until frozen
    trained_names: tuple[str, ...] = ("weight",)

    def _begin(self, format: type[Format], form: dict[str, Any]) -> None:
        """Set what each of these layers starts with."""
        self.format, self.form = format, format.form(**form)
        self.frozen = False
        self._empty = None
        self._sizes = ()

    @classmethod
    def from_arguments(cls: type[Matrix], arguments: dict[str, Any]) -> Matrix:
        """An empty layer on "meta" as `arguments()` describes it, to be loaded."""
        given = {k: v for k, v in arguments.items() if k not in STATES}
        if "form" in given:
            given.update(given.pop("form"), format=formats.named(given["format"]))
        dtype = given.pop("dtype", None)
        new = cls(**given, device="meta")
        if arguments["frozen"]:
            new.set_storage(new.empty_storage())
            new.float_dtype = None if dtype is None else getattr(torch, dtype)
        return new

    def make_storage(self) -> Format:
        """Convert the float weight to compressed storage (recovery state only)."""
        stored: Format = self.format.from_dense(self.weight, **self.form)
        return stored

    def empty_storage(self) -> Format:
        """Storage on "meta" of a layer that is to be loaded."""
        empty: Format = self.format.empty(*self.matrix_sizes, **self.form)
        return empty

    def trained_weight(self) -> Tensor:
        """[N, K] as it will be stored, differentiable for ``weight`` (recovery state only)."""
        return self._straight_through(self.weight)

    def _straight_through(self, weight: Tensor) -> Tensor:
        """``weight`` rounded to what is stored; the gradient passes as if it were not."""
        return straight_through(weight, self.format.__name__, self.form)

    @property
    def density(self) -> float:
        """Share of the entries that are stored."""
        return self.storage().density if self.frozen else 1.0

    @property
    def closed_to_compress(self) -> str | None:
        if self.frozen:
            return "it is thawed" if self.thawed else "it is frozen already"
        return None

    def least_bytes(self) -> int:
        empty = self.from_arguments({**self.arguments(), "frozen": True})
        both = [layer._parameters.get("bias") for layer in (self, empty)]  # of two dtypes, maybe
        own, other = (0 if bias is None else bias.nbytes for bias in both)
        return empty.nbytes - other + own

    @property
    def storage_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the tensors of the frozen state."""
        return self.format.TENSORS

    def _arguments(self) -> tuple[Any, ...]:
        """`Format.arguments` of the frozen storage, without the way by a `Format`."""
        parameters = self._parameters  # getattr would take a microsecond for each
        stored: list[Any] = [parameters[name] for name in self.format.TENSORS]
        if not torch.compiler.is_compiling():  # a graph has the parameters
            stored = [t.plain if type(t) is StoredParameter else t for t in stored]
        return (*stored, *self._sizes)

    def storage(self) -> Any:
        """The compressed weight: its tensors when frozen, else made of the float weight now."""
        if not self.frozen:
            return self._convert()
        assert self._empty is not None
        return self._empty.with_tensors(
            {name: self._parameters[name] for name in self.storage_names}
        )

    def _convert(self) -> Format:
        # Storage made under inference_mode could never take part in autograd later.
        with torch.inference_mode(False), torch.no_grad():
            return self.make_storage()

    def share(self, other: StoredMatrix) -> int:
        """Take the tensors of ``other`` that are equal to own, both frozen; the bytes that go."""
        gone = 0
        for name in self.storage_names:
            own, theirs = self._parameters.get(name), other._parameters.get(name)
            if own is None or theirs is None or own.dtype != theirs.dtype:
                continue
            if own is not theirs and torch.equal(own, theirs):
                self._parameters[name] = theirs
                gone += own.nbytes
        return gone

    def dense_weight(self) -> Tensor:
        """The matrix [N, K] that the layer stands for, float32."""
        with torch.no_grad():
            weight: Tensor = self.storage().to_dense()
            return weight.float()

    @property
    def computes_weight(self) -> str | None:
        return self._where_it_went if self.__dict__.get("frozen", False) else None

    def make_weight(self) -> Tensor:
        dense: Tensor = self.storage().to_dense() if self.frozen else self.trained_weight()
        return dense.to(self._weight_like()[0])

    def _weight_like(self) -> tuple[torch.dtype, torch.device, bool]:
        names = self.storage_names if self.frozen else self.trained_names
        kept = [p for p in map(self._parameters.get, names) if p is not None]
        dtype = kept[0].dtype if not self.frozen else self.float_dtype
        if dtype is None:  # of an older file, which does not say it
            bias = self._parameters.get("bias")
            dtype = torch.float32 if bias is None else bias.dtype
        return dtype, kept[0].device, any(p.requires_grad for p in kept)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # first, for each call reads the bias
        except AttributeError:
            if name != "weight":
                self._check_settable(name)
            form = self.__dict__.get("form", {})
            if name in form and name not in self.format.TENSORS:
                return form[name]
            raise

    def _check_settable(self, name: str) -> None:
        super()._check_settable(name)
        if name in self.trained_names and self.__dict__.get("frozen", False):
            raise AttributeError(f"{type(self).__name__}.{name}: {self._where_it_went}")

    @property
    def _where_it_went(self) -> str:
        """What to do for a float weight that is no more."""
        return (
            "the layer is frozen and keeps its compressed storage alone, which load_state_dict() "
            "writes; dense_weight() makes the matrix that it stands for"
        )

    def _dtype_argument(self) -> dict[str, str]:
        # left out where it says nothing
        dtype = self.float_dtype
        if not self.frozen or dtype in (None, torch.float32):
            return {}
        return {"dtype": str(dtype).removeprefix("torch.")}

    def form_arguments(self) -> dict[str, Any]:
        """The part of `arguments` that the format takes."""
        if "format" in self.FIELDS:
            return {"format": self.format.__name__, "form": self.form}
        return self.form


@fx.wrap  # one node, for rounding asks for values
def straight_through(weight: Tensor, format: str, form: dict[str, Any]) -> Tensor:
    """``weight`` rounded to what a format stores; the gradient passes as if it were not."""
    with torch.no_grad():
        rounded = formats.named(format).rounded(weight, **form).to(weight.dtype)
    # weight - weight is 0 exactly, so the value is that of `rounded` to the last bit.
    return rounded + (weight - weight.detach())
