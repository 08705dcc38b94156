"""The index of a large dataset: episodes and columns of numbers as files that all processes share.

A folder of `index_dir()` named by the dataset's files (`fingerprint`) has one for each choice of columns: numbers.npy,
lengths.npy, episodes.json and ends.npy (a JSON text for each episode, one after the other), a file for each column, and
about.json, which is written last.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0.datasets.errors import DataError
from pi0.fetch import cache_dir
from pi0.reading import read_npy_header

REVISION = 1  # raise it when what is read or checked changes
MIN_FRAMES = 2**18  # a smaller dataset is read anew each time
MAX_FRAMES = 2**33  # one that claims more too


def index_dir() -> Path:
    """The folder of all indices."""
    return cache_dir() / "index"


def fingerprint(root: Path) -> str:
    """A hash of the names, sizes and times of change of all files of a dataset."""
    found = hashlib.sha256(str(REVISION).encode())
    folders = [root]
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif entry.is_file():
                    stat = entry.stat()
                    name = os.path.relpath(entry.path, root)
                    found.update(repr((name, stat.st_size, stat.st_mtime_ns)).encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:32]


class FileArray:
    """An array [F, ...] in an .npy file, read where it is indexed by a row or by an array of rows.

    It is not mapped into memory: frames are drawn at random, and for each the kernel would map up to megabytes around
    it. The system keeps what was read, once for all processes. Raises OSError or ValueError for a damaged file.
    """

    def __init__(self, file: Path):
        self._stream = file.open("rb", buffering=0)
        self.shape, _, self.dtype = read_npy_header(self._stream, str(file))
        self.ndim, self._first = len(self.shape), self._stream.tell()
        self._row = self.dtype.itemsize * math.prod(self.shape[1:])
        if os.fstat(self._stream.fileno()).st_size != self._first + self.shape[0] * self._row:
            raise ValueError(f"{file} is damaged: it has not the bytes of {list(self.shape)} {self.dtype}")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # without reading ahead

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, int | np.integer):
            return self._read(int(rows), int(rows) + 1)[0, ...]
        rows = np.asarray(rows)
        if not len(rows) or (np.diff(rows) == 1).all():
            return self._read(int(rows[0]), int(rows[-1]) + 1) if len(rows) else self._read(0, 0)
        wanted, places = np.unique(rows, return_inverse=True)
        parts = np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1)
        return np.concatenate([self._read(int(part[0]), int(part[-1]) + 1) for part in parts])[places]

    def _read(self, start: int, stop: int) -> np.ndarray:
        """The rows from `start` to before `stop`."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start} to {stop} are not within 0 to {self.shape[0]}")
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        left: Any = out.reshape(-1).view(np.uint8)
        place = self._first + start * self._row
        while len(left):
            count = os.preadv(self._stream.fileno(), [left], place)
            if not count:
                raise OSError(f"{self._stream.name} has become shorter; open the dataset anew")
            left, place = left[count:], place + count
        return out


class Index:
    """An index in a folder. Pickling keeps the folder's path alone. Raises OSError or ValueError for a damaged one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.numbers, self.lengths, self._ends = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("numbers", "lengths", "ends")
        )
        self.first_rows = np.concatenate([[0], np.cumsum(self.lengths)])
        self._texts = np.memmap(folder / "episodes.json", np.uint8, "r")
        self._arrays = {name: FileArray(folder / f"column-{i}.npy") for i, name in enumerate(self.about["columns"])}

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        return Index, (self.folder,)

    def episode(self, position: int) -> dict[str, Any]:
        """The values of an episode."""
        start = int(self._ends[position - 1]) if position else 0
        return json.loads(bytes(self._texts[start : int(self._ends[position])]))

    def array(self, column: str) -> FileArray:
        """A column of all episodes, [F, ...]."""
        return self._arrays[column]

    def problems(self) -> dict[int, list[DataError]]:
        """The problems by episode."""
        found: dict[int, list[DataError]] = {}
        for problem, file, episode, frame in self.about["problems"]:
            found.setdefault(episode, []).append(DataError(problem, file, episode, frame))
        return found


class IndexedEpisodes(Sequence[Any]):
    """Some episodes of an index, each made by the dataset's format when it is asked for."""

    def __init__(self, index: Index, positions: np.ndarray, format: type[Any], root: Path):
        self._index, self.positions, self._format, self._root = index, positions, format, root

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        position = int(self.positions[i])
        try:
            episode = self._format.unpack_episode(self._index.episode(position), self._root)
            start, end = self._index.first_rows[position : position + 2]
            if (episode.index, episode.length) != (self._index.numbers[position], end - start):
                raise ValueError(f"episode {episode.index!r:.20} has {episode.length!r:.20} frames there")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"the index is damaged: {error}", self._index.folder / "episodes.json") from error
        return episode


class IndexedColumns(Mapping[str, Any]):
    """The columns of some episodes of an index."""

    def __init__(self, index: Index, positions: np.ndarray):
        self._index, self._positions = index, positions
        self._starts = np.concatenate([[0], np.cumsum(index.lengths[positions])])
        self._first_rows = index.first_rows[positions]
        self._columns: dict[str, IndexedColumn] = {}  # those that were asked for

    def __reduce__(self) -> tuple[type[IndexedColumns], tuple[Index, np.ndarray]]:
        return IndexedColumns, (self._index, self._positions)

    def __getitem__(self, name: str) -> Any:
        if name not in self._columns:
            array, texts = self._index.array(name), self._index.about["texts"].get(name)
            self._columns[name] = IndexedColumn(array, self._starts, self._first_rows, texts)
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.about["columns"])

    def __len__(self) -> int:
        return len(self._index.about["columns"])


class IndexedColumn:
    """A column [F, ...] of some episodes, read where it is indexed; as an array, it is read as a whole."""

    def __init__(self, array: FileArray, starts: np.ndarray, first_rows: np.ndarray, texts: list[str] | None):
        self._array, self._starts, self._first_rows, self._texts = array, starts, first_rows, texts
        self.shape, self.dtype = (int(starts[-1]), *array.shape[1:]), array.dtype
        self.ndim = array.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, frames: Any) -> Any:
        if isinstance(frames, int | np.integer):
            position = bisect.bisect_right(self._starts, int(frames)) - 1
            value = self._array[int(frames) - int(self._starts[position]) + int(self._first_rows[position])]
            return value if self._texts is None else self._texts[int(value)]
        if isinstance(frames, slice):
            frames = np.arange(*frames.indices(len(self)))
        frames = np.asarray(frames)
        positions = np.searchsorted(self._starts, frames, side="right") - 1
        values = self._array[frames - self._starts[positions] + self._first_rows[positions]]
        return values if self._texts is None else np.array(self._texts, object)[values]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self[np.arange(len(self))]
        return values if dtype is None else values.astype(dtype)


def find_index(root: Path, columns: Sequence[Any] | None) -> Index | None:
    """The index of a dataset for a choice of columns (None: any), or None where there is none."""
    if not root.is_dir() or not index_dir().is_dir():
        return None
    folder = index_dir() / fingerprint(root)
    for found in sorted(folder.glob("*/about.json")) if columns is None else [folder / _name(columns) / "about.json"]:
        try:
            return Index(found.parent)
        except (OSError, ValueError, KeyError):
            continue
    return None


def _name(columns: Sequence[Any]) -> str:
    return hashlib.sha256(repr(columns).encode()).hexdigest()[:16]


def write_index(
    root: Path,
    columns: Sequence[Any],
    episodes: Sequence[Any],
    packed: Iterable[dict[str, Any]],
    parts: Iterable[tuple[int, int, Mapping[str, np.ndarray]]],
    about: dict[str, Any],
) -> Index:
    """Write the index of a dataset; `parts` are the columns from row to row, without damaged episodes.

    `about` may be changed until the parts end. Raises OSError where it cannot be written. Columns are [F, ...].
    """
    content = fingerprint(root)
    target = index_dir() / content / _name(columns)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="partial-") as partial:
        folder = Path(partial, "index")
        write_files(folder, content, episodes, packed, parts, about)
        try:
            folder.rename(target)
        except OSError:
            if not (target / "about.json").exists():  # else another process was faster
                raise
    return Index(target)


def write_files(
    folder: Path,
    content: str,
    episodes: Sequence[Any],
    packed: Iterable[dict[str, Any]],
    parts: Iterable[tuple[int, int, Mapping[str, np.ndarray]]],
    about: dict[str, Any],
) -> None:
    """Write the files of an index, of columns [F, ...], into a new folder; see `write_index`."""
    folder.mkdir()
    lengths = np.array([episode.length for episode in episodes], np.int64)
    np.save(folder / "numbers.npy", np.array([episode.index for episode in episodes], np.int64))
    np.save(folder / "lengths.npy", lengths)
    ends, end = [], 0
    with (folder / "episodes.json").open("wb") as stream:
        for values in packed:
            end += stream.write(json.dumps(values).encode("utf-8"))
            ends.append(end)
    np.save(folder / "ends.npy", np.array(ends, np.int64))
    texts = _write_columns(folder, int(lengths.sum()), parts, about)
    about |= {"texts": texts, "content": content}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _write_columns(
    folder: Path, total: int, parts: Iterable[tuple[int, int, Mapping[str, Any]]], about: dict[str, Any]
) -> dict[str, list[str]]:
    """Write a file for each column, and return the texts of those that have texts."""
    arrays: dict[str, np.memmap] = {}
    texts: dict[str, dict[str, int]] = {}
    for start, end, part in parts:
        for name, values in part.items():
            if values.dtype == object:
                known = texts.setdefault(name, {})
                values = np.array([known.setdefault(text, len(known)) for text in values], np.int32)
            if name not in arrays:
                file = folder / f"column-{len(arrays)}.npy"
                arrays[name] = np.lib.format.open_memmap(file, "w+", values.dtype, (total, *values.shape[1:]))
            arrays[name][start:end] = values
    for array in arrays.values():
        array.flush()
    about["columns"] = list(arrays)
    return {name: list(known) for name, known in texts.items()}
