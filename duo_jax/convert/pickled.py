"""Reads files of `torch.save` without PyTorch, and without running any code that they name.

Such a file is a zip: a pickle that describes the objects, and one raw file per tensor storage. Here the pickle is read with
every class replaced: tensors become plain descriptions, and an object of any other class (a tokenizer, an OmegaConf config,
an optimizer) becomes `Inert`, which keeps its state and does nothing. This allows less than `weights_only` does, and yet
reads checkpoints that hold such objects beside their weights.
"""

from __future__ import annotations

import collections
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from duo_jax.errors import UserError

_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class Tensor(NamedTuple):
    """The place of a tensor's numbers in the file; `Archive.array` reads them."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Inert:
    """Stands for an object of a class that is not loaded.

    Attributes:
        state: the state that the pickle sets.
        items: the items that the pickle sets by key.
    """

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        """Accepts any arguments."""
        self = object.__new__(cls)
        self.items = {}
        return self

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def __call__(self, *_: Any, **__: Any) -> Inert:
        """Stands for the result of a function that is not called."""
        return Inert()

    def extend(self, _: Any) -> None:
        """Ignores the items that the pickle appends to a list."""

    append = add = extend


class _Rebuild:
    """Does what PyTorch's `_rebuild_tensor_v2` does. It has no attributes, because a pickle could set them."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
        numbers = (offset, *shape, *strides)
        whole = all(type(n) is int for n in numbers) and len(shape) == len(strides)
        if not isinstance(storage, _Storage) or not whole:
            raise pickle.UnpicklingError("a malformed tensor")
        return Tensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> Any:
        return tensor


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return name
        return _KNOWN.get((module, name), Inert)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, str) or dtype not in _DTYPES:
            raise pickle.UnpicklingError("a tensor of an unknown type")
        return _Storage(str(key), _DTYPES[dtype])


class Archive:
    """An open file of `torch.save`; `root` is the object saved in it."""

    def __init__(self, path: Path) -> None:
        """Reads everything but the tensors' numbers.

        Raises:
            UserError: the file is not such a zip, or is damaged.
        """
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
            index = next((name for name in self._zip.namelist() if name.endswith("/data.pkl")), None)
            if index is None:
                raise UserError(f"{path} is a zip, but not one that torch.save wrote.")
            self._folder = index.removesuffix("data.pkl")
            order = self._folder + "byteorder"
            if order in self._zip.namelist() and self._zip.read(order) != b"little":
                raise UserError(f"{path} was written on a big-endian machine; save it again on a little-endian one.")
            with self._zip.open(index) as file:
                self.root = _Unpickler(file).load()
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
        except Exception as error:  # a damaged pickle may raise anything
            if path.is_file() and not zipfile.is_zipfile(path):
                hint = "load and save it again with PyTorch 1.6 or newer"
                raise UserError(f"{path} is not a file of torch.save, or an old or damaged one; {hint}.") from error
            raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error

    def close(self) -> None:
        """Closes the file."""
        self._zip.close()

    def array(self, tensor: Tensor) -> np.ndarray:
        """Returns a tensor's numbers.

        Raises:
            UserError: they are missing or cut short.
        """
        storage, offset, shape, strides = tensor
        dtype = storage.dtype
        try:
            flat = np.frombuffer(self._zip.read(f"{self._folder}data/{storage.key}"), dtype)
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{self._path} is damaged: {error}.") from error
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if min((offset, *shape, *strides), default=0) < 0 or (math.prod(shape) and last >= flat.size):
            raise UserError(f"{self._path} is damaged: a tensor of shape {shape} extends beyond its stored numbers.")
        steps = [stride * dtype.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)


def plain(value: Any) -> Any:
    """Returns the config that pickled OmegaConf objects describe, as dicts, lists and scalars; None for other objects."""
    if isinstance(value, Inert):
        state = value.state if isinstance(value.state, dict) else {}
        return plain(state["_content"]) if "_content" in state else plain(state.get("_val"))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) else None
