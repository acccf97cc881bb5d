"""Pickles of NumPy's arrays and plain values, read without calling anything that they name.

A pickle is a program that may call any function. Here the names of NumPy's makers stand for the few lines below, which
take numbers and nothing else, since NumPy's own trust the descriptions of types that they are given.
"""

import io
import pickle
from codecs import encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from point_peft.errors import DataError

NUMBERS = "biuf"
"""Kinds of types that are read: bool, integers, floating point."""


class PickledType:
    """A type of numbers, in the place of `numpy.dtype`."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in NUMBERS:
            raise pickle.UnpicklingError(f"it holds values of the type {self.dtype}; only numbers are read")

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """An array of numbers, in the place of `numpy.ndarray`; NumPy's functions take it for one."""

    def __init__(self, *_: object) -> None:
        self.values: npt.NDArray[Any] = np.empty(0)

    def __setstate__(self, state: Sequence[Any]) -> None:
        _, shape, kind, by_column, content = state
        self.values = _array(content, kind, shape, "F" if by_column else "C")

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.values.astype(self.values.dtype if dtype is None else dtype)


def _array(content: bytes, kind: PickledType, shape: Sequence[int], order: Any) -> npt.NDArray[Any]:
    return np.frombuffer(content, kind.dtype).reshape(shape, order=order)


def _number(kind: PickledType, content: bytes) -> Any:
    return np.frombuffer(content, kind.dtype)[0]


STAND_INS: Mapping[tuple[str, str], Any] = {
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): PickledType,
    ("_codecs", "encode"): encode,
    **{(f"{core}.multiarray", "_reconstruct"): PickledArray for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.multiarray", "scalar"): _number for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.numeric", "_frombuffer"): _array for core in ("numpy.core", "numpy._core")},
}
"""All names that a pickle may use -> what they stand for; old protocols write bytes as text to be encoded."""


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which is refused")
        return STAND_INS[module_name, global_name]


def read_pickle(path: Path) -> Any:
    """The lists, dicts, numbers and arrays in a pickle. Raises `DataError`, with the name, if it asks for more."""
    try:
        return _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except (
        *(pickle.UnpicklingError, OSError, EOFError, LookupError),
        *(AttributeError, MemoryError, OverflowError, TypeError, ValueError),
    ) as error:
        raise DataError(f"{path} cannot be read as a pickle of arrays only: {error}") from error
