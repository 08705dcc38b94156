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
from pi0.reading import ZIP_ERRORS, read_npy_header, require_regular, require_stored


def read_npz(file: Path) -> dict[str, Tensor]:
    """The arrays of an npz file, memory-mapped unless compressed. Raises CheckpointError."""
    try:
        require_regular(file)
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
            tensors = {m.filename.removesuffix(".npy"): _member(file, archive, stream, m) for m in members}
    except (*ZIP_ERRORS, struct.error) as error:
        raise CheckpointError(f"{file} is not an npz file, or is damaged: {error}") from error
    require_stored(str(file), sum(t.size for t in tensors.values()), file.stat().st_size, CheckpointError)
    return tensors


def _member(file: Path, archive: zipfile.ZipFile, stream: BinaryIO, member: zipfile.ZipInfo) -> Tensor:
    with archive.open(member) as header:
        shape, fortran_order, dtype = read_npy_header(header, member.filename)
        start = header.tell()
    if dtype == np.dtype("V2"):
        dtype = np.dtype(ml_dtypes.bfloat16)
    if fortran_order or start + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{member.filename} is truncated, or not in C order")
    if member.compress_type != zipfile.ZIP_STORED:

        def read(index: Index) -> np.ndarray:
            array = np.empty(shape, dtype)
            try:
                with zipfile.ZipFile(file) as again, again.open(member) as content:
                    content.read(start)
                    array.reshape(-1).view(np.uint8)[:] = np.frombuffer(content.read(array.nbytes), np.uint8)
            except ZIP_ERRORS as error:
                raise CheckpointError(f"{file}: {member.filename} is damaged: {error}") from error
            return array[index]

        return Tensor(shape, dtype, read, anyhow=True)
    stream.seek(member.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", stream.read(4))
    start += member.header_offset + 30 + name_length + extra_length
    if start + math.prod(shape) * dtype.itemsize > file.stat().st_size:
        raise ValueError(f"{member.filename} is truncated")
    return mapped(file, dtype, shape, start)
