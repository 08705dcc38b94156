"""Read npz files of big_vision."""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from convert.tensors import CheckpointError, Index, Tensor, mapped


def read_npz(file: Path) -> dict[str, Tensor]:
    """The arrays of an npz file, memory-mapped unless compressed. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
            return {m.filename.removesuffix(".npy"): _member(file, archive, stream, m) for m in members}
    except (zipfile.BadZipFile, ValueError, struct.error) as error:
        raise CheckpointError(f"{file} is not an npz file, or is damaged: {error}") from error


def _member(file: Path, archive: zipfile.ZipFile, stream: BinaryIO, member: zipfile.ZipInfo) -> Tensor:
    with archive.open(member) as header:
        version = np.lib.format.read_magic(header)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(header)
        start = header.tell()
    if dtype == np.dtype("V2"):  # NumPy's encoding of bfloat16
        dtype = np.dtype(ml_dtypes.bfloat16)
    if dtype.hasobject or fortran_order:
        raise ValueError(f"{member.filename} holds {dtype}, fortran_order={fortran_order}; expected plain C arrays")
    if member.compress_type != zipfile.ZIP_STORED:

        def read(index: Index) -> np.ndarray:
            return np.load(file)[member.filename.removesuffix(".npy")].view(dtype)[index]

        return Tensor(shape, dtype, read)
    stream.seek(member.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", stream.read(4))
    start += member.header_offset + 30 + name_length + extra_length
    if start + math.prod(shape) * dtype.itemsize > file.stat().st_size:
        raise ValueError(f"{member.filename} is truncated")
    return mapped(file, dtype, shape, start)
