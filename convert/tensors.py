"""Named arrays that are read only when asked, as a checkpoint of any format holds them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np


class CheckpointError(ValueError):
    """A file or folder that is no checkpoint, or a damaged one; the message names it."""


# A tensor larger than this many bytes is written slice by slice, and read chunk by chunk.
PIECE = 64 << 20

Index = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A named array that is read only when asked: `read(())` gives all of it, `read(index)` a part.

    Stored tensors take any basic index; tensors that a table makes take `()` and, where they are `sliced`, an index or
    a slice of the first axis alone.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    sliced: bool = True

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def cast(self, dtype: np.dtype) -> Tensor:
        """The same in another dtype."""
        if self.dtype == dtype:
            return self
        return dataclasses.replace(self, dtype=dtype, read=lambda index: self.read(index).astype(dtype))

    @classmethod
    def of(cls, array: np.ndarray) -> Tensor:
        """A tensor that is in memory already."""
        return cls(array.shape, array.dtype, lambda index: array[index])


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal in dtype, shape and every bit."""
    bits_a, bits_b = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits_a, bits_b)


def pieces(tensor: Tensor) -> list[tuple[slice, ...]]:
    """What to read one after the other to have all of a tensor: slices of its first axis where it is large."""
    if tensor.size <= PIECE or not tensor.sliced:
        return [()]
    rows = max(PIECE * tensor.shape[0] // tensor.size, 1)
    return [(slice(i, min(i + rows, tensor.shape[0])),) for i in range(0, tensor.shape[0], rows)]


def contiguous(array: np.ndarray, side: int = 64) -> np.ndarray:
    """The array in C order. Transposed matrices are copied in squares that fit the cache, which NumPy does not."""
    if array.flags.c_contiguous or array.ndim < 2 or array.size < PIECE >> 8 or array.strides[-1] == array.itemsize:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    bits = np.dtype(f"u{array.itemsize}")  # NumPy copies bfloat16 by a call for each value
    source, target = array.view(bits), out.view(bits)
    rows, columns = (range(0, size, side) for size in array.shape[-2:])
    for index in np.ndindex(array.shape[:-2]):
        for i, j in itertools.product(rows, columns):
            square = (*index, slice(i, i + side), slice(j, j + side))
            target[square] = source[square]
    return out


def mapped(file: Path, dtype: np.dtype, shape: tuple[int, ...], start: int) -> Tensor:
    """An array that lies in a file as it is, from the byte `start` on; memory-mapped."""

    def read(index: tuple[int | slice, ...]) -> np.ndarray:
        if not math.prod(shape):
            return np.empty(shape, dtype)[index]
        return np.memmap(file, dtype, "r", start, shape)[index]

    return Tensor(shape, dtype, read)
