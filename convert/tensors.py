"""Lazily read arrays, the common form of tensors in checkpoints of any format."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np


class CheckpointError(ValueError):
    """A file or folder is not a checkpoint, or is damaged; the message names it."""


# Bytes above which a tensor is written slice by slice and read chunk by chunk.
PIECE = 64 << 20

Index = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A lazily read array: `read(())` returns all of it, `read(index)` a part.

    All support `()` and, if `sliced`, an index or a slice of the first axis; stored tensors any basic index. With
    `anyhow` a slice of each axis is one that they support; `part` reads a box of any.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    sliced: bool = True
    anyhow: bool = False

    def part(self, box: tuple[slice, ...]) -> np.ndarray:
        """The part of it in `box`, a slice of each axis: [stop − start, ...].

        No more is read than the tensor's kind of index allows.
        """
        if self.anyhow:
            return self.read(box)
        if self.sliced and box:
            return self.read(box[:1])[(slice(None), *box[1:])]
        return self.read(())[box]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def cast(self, dtype: np.dtype) -> Tensor:
        """The tensor converted to another dtype."""
        if self.dtype == dtype:
            return self
        return dataclasses.replace(self, dtype=dtype, read=lambda index: self.read(index).astype(dtype))

    @classmethod
    def of(cls, array: np.ndarray) -> Tensor:
        """A tensor in memory, of an array of any shape."""
        return cls(array.shape, array.dtype, lambda index: array[index], anyhow=True)


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of any shape are equal in dtype, shape and every bit."""
    bits_a, bits_b = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits_a, bits_b)


def pieces(tensor: Tensor) -> list[tuple[slice, ...]]:
    """Indices that cover a tensor: slices of its first axis where it is large."""
    if tensor.size <= PIECE or not tensor.sliced:
        return [()]
    rows = max(PIECE * tensor.shape[0] // tensor.size, 1)
    return [(slice(i, min(i + rows, tensor.shape[0])),) for i in range(0, tensor.shape[0], rows)]


def contiguous(array: np.ndarray, side: int = 64) -> np.ndarray:
    """The array, of any shape, in C order.

    Transposed matrices are copied in tiles of `side` that fit the cache, unlike in NumPy.
    """
    if array.flags.c_contiguous or array.ndim < 2 or array.size < PIECE >> 8 or array.strides[-1] == array.itemsize:
        return np.ascontiguousarray(array).reshape(array.shape)  # which makes a number an array of one
    out = np.empty(array.shape, array.dtype)
    bits = np.dtype(f"u{array.itemsize}")  # NumPy copies bfloat16 with one call per value
    source, target = array.view(bits), out.view(bits)
    rows, columns = (range(0, size, side) for size in array.shape[-2:])
    for index in np.ndindex(array.shape[:-2]):
        for i, j in itertools.product(rows, columns):
            tile = (*index, slice(i, i + side), slice(j, j + side))
            target[tile] = source[tile]
    return out


def mapped(file: Path, dtype: np.dtype, shape: tuple[int, ...], start: int) -> Tensor:
    """A memory-mapped C-order array in a file, starting at byte `start`."""

    def read(index: Index) -> np.ndarray:
        if not math.prod(shape):
            return np.empty(shape, dtype)[index]
        return np.memmap(file, dtype, "r", start, shape)[index]

    return Tensor(shape, dtype, read, anyhow=True)
