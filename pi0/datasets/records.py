"""Files of records: TFRecord and ArrayRecord, and the `tf.train.Example` in them, without TensorFlow.

None of it is trusted: lengths are checked against the file, and checksums against the bytes, before anything is read
or decoded further.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pi0.datasets.errors import DataError
from pi0.plugins import require_extra
from pi0.reading import require_regular

MAX_RECORD = 2**31  # bytes of a record: an episode with its images
MAX_RECORDS = 2**26  # of a file
_HEADER = struct.Struct("<QI")
BLOCK, BLOCK_HEADER = 2**16, 24  # bytes of a Riegeli file, of which ArrayRecord is a kind
_CHUNK = struct.Struct("<QQQQQ")  # hash, size of the data, their hash, type and number of records, decoded size
_RECORDS = ord("r")  # the type of a chunk


class Place(NamedTuple):
    """Where a record is: its number in the file, and in a TFRecord file the first byte of its header (else -1)."""

    number: int
    offset: int


def read_records(file: Path) -> Iterator[tuple[Place, bytes]]:
    """The records of a TFRecord or, where its name says so, ArrayRecord file. Raises DataError."""
    if not file.exists():
        raise DataError("the file is missing", file)
    require_regular(file, DataError)
    if ".array_record" in file.name:
        with _ArrayRecord(file) as reader:
            for number in range(len(reader)):
                yield Place(number, -1), reader.read(number)
        return
    place = Place(0, 0)
    while place.offset < file.stat().st_size:
        record = read_record(file, place)
        yield place, record
        place = Place(place.number + 1, place.offset + len(record) + _HEADER.size + 4)


def read_record(file: Path, place: Place) -> bytes:
    """The record at a place in a file. Raises DataError."""
    if place.offset < 0:
        with _ArrayRecord(file) as reader:
            return reader.read(place.number)
    try:
        with file.open("rb") as stream:
            stream.seek(place.offset)
            header = stream.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise DataError(f"record {place.number} is truncated", file)
            length, checksum = _HEADER.unpack(header)
            if _masked_crc(header[:8]) != checksum:
                raise DataError(f"the length of record {place.number} does not match its checksum", file)
            left = file.stat().st_size - place.offset - _HEADER.size - 4
            if length > min(left, MAX_RECORD):
                raise DataError(
                    f"record {place.number} has {length} bytes; {left} are left, {MAX_RECORD} allowed", file
                )
            record, end = stream.read(length), stream.read(4)
    except OSError as error:
        raise DataError(f"cannot be read: {error}", file) from error
    if len(end) < 4 or _masked_crc(record) != struct.unpack("<I", end)[0]:
        raise DataError(f"record {place.number} does not match its checksum", file)
    return record


class _ArrayRecord:
    """An ArrayRecord file that is open; its reader verifies checksums. Raises DataError."""

    def __init__(self, file: Path):
        require_extra("data", "array_record")
        from array_record.python import array_record_module

        self.file = file
        try:
            self._reader = array_record_module.ArrayRecordReader(str(file))
            count = self._reader.num_records()
        except Exception as error:
            raise DataError(f"is no ArrayRecord file, or is damaged: {error}", file) from error
        if count > min(MAX_RECORDS, file.stat().st_size):
            raise DataError(f"claims {count} records", file)

    def __len__(self) -> int:
        return int(self._reader.num_records())

    def read(self, number: int) -> bytes:
        """One record."""
        try:
            (record,) = self._reader.read([number])
        except Exception as error:
            raise DataError(f"record {number} is damaged: {error}", self.file) from error
        return record

    def __enter__(self) -> _ArrayRecord:
        return self

    def __exit__(self, *exception: object) -> None:
        self._reader.close()


def _masked_crc(data: bytes) -> int:
    """The CRC-32C of bytes, masked as TFRecord files have it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def array_record_writer(file: Path) -> Any:
    """A writer of an ArrayRecord file with `write` and `close`, whose records lie as `record_offsets` finds them."""
    require_extra("data", "array_record")
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordWriter(str(file), "group_size:1,uncompressed")


def record_offsets(file: Path, checksums: Sequence[tuple[int, int]]) -> list[int]:
    """The offset of each record in a file of `array_record_writer`, given their sizes and CRC-32C.

    A file is blocks of 64 KiB that begin with a header of 24 bytes, and between those headers it is chunks: a header of
    40 bytes, and the data, which end with the record (https://github.com/google/riegeli/blob/master/doc). Raises
    DataError where the record is not at its place.
    """
    offsets, chunk = [], 0  # counted without headers of blocks
    with file.open("rb") as stream:

        def read(start: int, size: int) -> bytes:
            first, last = _in_file(start), span_end(_in_file(start), size)
            stream.seek(first)
            return without_headers(stream.read(last - first), first)

        chunk += _CHUNK.size  # the file's signature
        for number, (size, checksum) in enumerate(checksums):
            _, stored, _, kind, decoded = _CHUNK.unpack(read(chunk, _CHUNK.size))
            place = chunk + _CHUNK.size + stored - decoded
            if kind != (1 << 8 | _RECORDS) or decoded != size or crc32c(read(place, size)) != checksum:
                raise DataError(f"record {number} is not where it was expected; which array_record wrote it?", file)
            offsets.append(_in_file(place))
            chunk += _CHUNK.size + stored
    return offsets


def _in_file(place: int) -> int:
    """The offset in a file of a byte that is counted without the headers of blocks."""
    return place // (BLOCK - BLOCK_HEADER) * BLOCK + BLOCK_HEADER + place % (BLOCK - BLOCK_HEADER)


def span_end(offset: int, size: int) -> int:
    """Where a record of `size` bytes at an offset of `record_offsets` ends in its file."""
    place = offset - BLOCK_HEADER * (offset // BLOCK) - min(offset % BLOCK, BLOCK_HEADER)
    return _in_file(place + size - 1) + 1 if size else offset


def without_headers(data: bytes, offset: int) -> bytes:
    """The bytes of a file from an offset on, without the headers of blocks among them."""
    first = -offset % BLOCK
    if first >= len(data):
        return data
    parts = [data[:first]]
    parts += [data[start + BLOCK_HEADER : start + BLOCK] for start in range(first, len(data), BLOCK)]
    return b"".join(parts)


def crc32c(data: bytes) -> int:
    """The CRC-32C of bytes."""
    require_extra("data", "google_crc32c")
    import google_crc32c

    return google_crc32c.value(data)


def encode_example(features: Mapping[str, bytes | np.ndarray]) -> bytes:
    """A serialized `tf.train.Example`: bytes, floats as float32, and integers as int64, each flattened to [N]."""
    entries = []
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = _field(1, _field(1, value))
        elif np.issubdtype(value.dtype, np.floating):
            feature = _field(2, _field(1, value.astype("<f4").tobytes()))
        else:
            feature = _field(3, _field(1, b"".join(_encode_varint(int(n) & 2**64 - 1) for n in value.ravel())))
        entries.append(_field(1, _field(1, name.encode("utf-8")) + _field(2, feature)))
    return _field(1, b"".join(entries))


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _encode_varint(len(content)) + content


def _encode_varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes(found) + bytes([value])


class Example:
    """The features of a serialized `tf.train.Example` by name, decoded when they are asked for.

    The wire format of its messages: https://protobuf.dev/programming-guides/encoding. Raises DataError.
    """

    def __init__(self, record: bytes):
        self._record = memoryview(record)
        self._features: dict[str, tuple[int, int]] = {}
        for features in self._fields(0, len(record), 1):
            for entry in self._fields(*features, 1):
                parts: dict[int, tuple[int, int]] = {}
                for number, span in self._numbered(*entry):
                    parts.setdefault(number, span)
                key, value = parts.get(1, (0, 0)), parts.get(2, (0, 0))
                name = bytes(self._record[slice(*key)]).decode("utf-8", "replace")
                if name in self._features:
                    raise DataError(f"has the feature {name!r:.80} twice")
                self._features[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self._features

    def bytes_list(self, name: str) -> list[memoryview]:
        """The values of a feature of bytes, not copied."""
        return [self._record[slice(*span)] for span in self._values(name, 1)]

    def numbers(self, name: str) -> np.ndarray:
        """The values of a feature of floats, float32 [N], or integers, int64 [N].

        Raises DataError for what is neither.
        """
        which = next(iter(self._numbered(*self._feature(name))), (2, (0, 0)))[0]
        if which not in (2, 3):
            raise DataError(f"{name} is not numbers")
        parts = [np.asarray(self._record[slice(*span)], np.uint8) for span in self._values(name, which)]
        packed = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
        if which == 3:
            return _varints(packed, name)
        if len(packed) % 4:
            raise DataError(f"{name} has {len(packed)} bytes of float32")
        return packed.view("<f4")

    def _feature(self, name: str) -> tuple[int, int]:
        if name not in self._features:
            raise DataError(f"lacks the feature {name}")
        return self._features[name]

    def _values(self, name: str, which: int) -> list[tuple[int, int]]:
        return [value for values in self._fields(*self._feature(name), which) for value in self._fields(*values, 1)]

    def _fields(self, start: int, end: int, number: int) -> list[tuple[int, int]]:
        return [span for found, span in self._numbered(start, end) if found == number]

    def _numbered(self, start: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """The number and span of the fields of a message; a packed or single number is a span too."""
        place = start
        while place < end:
            tag, place = self._varint(place, end)
            before, kind = place, tag & 7
            if kind == 0:
                _, place = self._varint(place, end)
            elif kind == 2:
                length, before = self._varint(place, end)
                place = before + length
            elif kind in (1, 5):
                place += 8 if kind == 1 else 4
            else:
                raise DataError(f"is no tf.train.Example: wire type {kind}")
            if place > end:
                raise DataError("is no tf.train.Example: a field is longer than its message")
            yield tag >> 3, (before, place)

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        value = 0
        for i in range(min(10, end - place)):
            byte = self._record[place + i]
            value |= (byte & 127) << 7 * i
            if byte < 128:
                return value, place + i + 1
        raise DataError("is no tf.train.Example: a number has no end")


def _varints(packed: np.ndarray, name: str) -> np.ndarray:
    """The integers int64 [N] of packed variable-length bytes."""
    if not len(packed):
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(packed < 128) + 1
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    if not len(ends) or ends[-1] != len(packed) or (ends - starts).max() > 10:
        raise DataError(f"{name} has a number without an end")
    shifts = (7 * (np.arange(len(packed)) - np.repeat(starts, ends - starts))).astype(np.uint64)
    values: Any = np.add.reduceat((packed & 127).astype(np.uint64) << shifts, starts)
    return values.view(np.int64)
