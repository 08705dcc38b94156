"""Datasets of `pi0-cache --to arrayrecord`: a record per frame, read at random from this machine or from a bucket.

The folder has

- `shards/records-N-of-M.array_record`: whole episodes in order, a `tf.train.Example` for each frame with its encoded
  images, its own row of every column, and its texts. Any reader of ArrayRecord can read them, such as Grain's;
- `index-HASH/`, as `pi0.datasets.index` has it, with all columns of numbers and the place of each record. Of a bucket,
  this is fetched once by each machine (`$PI0_CACHE`); it is what chunks of actions and statistics are computed from;
- `meta/info.json`, written last: encoding, features, frame rate, and the content of the source.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0.datasets.base import Contents, Dataset, Episode
from pi0.datasets.errors import DataError
from pi0.datasets.images import Encoding
from pi0.datasets.index import MAX_FRAMES, Index, IndexedEpisodes
from pi0.datasets.records import Example, crc32c, span_end, without_headers
from pi0.fetch import fetch, fetched
from pi0.reading import read_json
from pi0.robots.transforms import resize_with_pad
from pi0.storage import SCHEMES, as_path, below, delete, digest, filesystem_of, is_bucket, requests

INFO = "meta/info.json"  # its folder is what `pi0.datasets.identity` knows a dataset by
FORMAT, REVISION = "pi0-arrayrecord", 1
PLACE = ("record/offset", "record/size", "record/crc32c")  # columns of the index
MAX_RECORD = 2**28  # bytes of a frame with all of its images
MAX_GAP = 2**16  # bytes between two records that are read and thrown away to save a request
_MAKE_AGAIN = "make it again with pi0-cache --to arrayrecord"


class ArrayRecordDataset(Dataset):
    """A dataset of `pi0-cache --to arrayrecord`, in a folder or in a bucket, which stays there but for its index.

    Images have the size that was chosen then. Raises DataError for a folder that is none or is not finished, another
    size than `image_size`, records that are missing, truncated or do not match their checksum, and a damaged index.
    """

    _info: dict[str, Any]

    @classmethod
    def locate(cls, root: str | Path) -> Path:
        return as_path(str(root)) if str(root).partition("://")[0] in SCHEMES else fetch(root)

    @classmethod
    def contents(cls, root: Path) -> Contents:
        info = read_info(root)
        index = open_index(root, info)
        return Contents(info["fps"], info["features"], IndexedEpisodes(index, np.arange(len(index.numbers)), cls, root))

    @classmethod
    def episode_numbers(cls, root: Path) -> list[int]:
        return open_index(root, read_info(root)).numbers.tolist()

    @classmethod
    def stored_size(cls, root: Path) -> tuple[int, int] | None:
        return _size(read_info(root))

    @classmethod
    def unpack_episode(cls, values: dict[str, Any], root: Path) -> Episode:
        return Episode(values["index"], values["length"], _below(root, values["file"]))

    def read_columns(self, episode: Episode) -> dict[str, np.ndarray]:
        assert self._index is not None
        first = int(self._index.first_rows[np.flatnonzero(self._index.numbers == episode.index)[0]])
        rows = slice(first, first + episode.length)
        return {name: self._index.array(name)[rows] for name in (*self.states, *self.actions)}

    def prepare(self) -> None:
        self._info = read_info(self.root)
        self._encoding = Encoding(self._info["encoding"])
        size = _size(self._info)
        if self.image_size is not None and size is not None and size != self.image_size:
            raise DataError(
                f"its images have size {size}, and {self.image_size} is asked for: {_MAKE_AGAIN} "
                f"--size {self.image_size[0]}x{self.image_size[1]}",
                self.root,
            )

    def decode(self, camera: str, position: int, frame: int) -> np.ndarray:
        return self._decode(position, frame, self._read_records([(position, frame)])[0], [camera])[camera]

    def images(self, position: int, frame: int, stored: bytes | None = None) -> dict[str, np.ndarray]:
        if self._cached or not self.cameras:
            return super().images(position, frame)
        record = stored or self._read_records([(position, frame)])[0]
        found = self._decode(position, frame, record, self.cameras)
        size = self.image_size
        return found if size is None else {camera: resize_with_pad(image, *size) for camera, image in found.items()}

    def item(self, i: int, stored: bytes | None = None) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"frame {i} is not within 0 to {len(self) - 1}")
        assert self._index is not None
        try:
            item = super().item(i, stored)
            for name in (*self.states, *self.actions):
                if not np.isfinite(item[name]).all():
                    raise ValueError(f"{name} is not finite")
            return item
        except (ValueError, KeyError, IndexError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"the index is damaged: frame {i}: {error!r:.200}", self._index.folder) from error

    def fetch(self, frames: Sequence[int]) -> dict[int, bytes]:
        """The records of frames, those near each other in a file by one request, and all at the same time."""
        if self._cached or not self.cameras:
            return {}
        positions = np.searchsorted(self.starts, frames, side="right") - 1
        places = [(int(p), i - int(self.starts[p])) for p, i in zip(positions, frames, strict=True)]
        return dict(zip(frames, self._read_records(places), strict=True))

    def _find_index(self, skip_damaged: bool) -> Index:
        return open_index(self.root, read_info(self.root))

    def _read_records(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """The records of frames, given as positions of their episodes and frames in them, after they were checked."""
        spans, checksums = [], []
        for position, frame in places:
            i = int(self.starts[position]) + frame
            offset, size, checksum = (int(self.table(name)[i]) for name in PLACE)
            episode = self.episodes[position]
            if not (0 <= offset < 2**62 and 0 <= size <= MAX_RECORD):
                problem = f"its record would have {size} bytes, from {offset} on"
                raise DataError(problem, episode.file, episode.index, frame)
            spans.append((episode.file, offset, span_end(offset, size)))
            checksums.append(checksum)
        found = read_spans(spans)
        records = [without_headers(stored, offset) for stored, (_, offset, _) in zip(found, spans, strict=True)]
        for place, span, checksum, stored, record in zip(places, spans, checksums, found, records, strict=True):
            if len(stored) < span[2] - span[1]:
                problem = "the file is truncated: it ends before this frame's record does"
            elif crc32c(record) != checksum:
                problem = "its record does not match its checksum: the file is damaged, or of another dataset"
            else:
                continue
            raise DataError(problem, span[0], self.episodes[place[0]].index, place[1])
        return records

    def _decode(self, position: int, frame: int, record: bytes, cameras: Sequence[str]) -> dict[str, np.ndarray]:
        """The images in a frame's record."""
        camera = ""
        try:
            example, found = Example(record), {}
            for camera in cameras:
                values = example.bytes_list(camera)
                if len(values) != 1:
                    raise DataError(f"has {len(values)} images of {camera}")
                found[camera] = self._encoding.decode(bytes(values[0]), _size(self._info), self.max_pixels)
            return found
        except DataError as error:
            episode = self.episodes[position]
            problem = f"{camera}: {error.problem}" if camera else error.problem
            raise DataError(problem, episode.file, episode.index, frame) from error


def read_info(root: Path) -> dict[str, Any]:
    """`meta/info.json` of a folder. Raises DataError."""
    file = root / INFO
    try:
        with requests(f"cannot read {file}"):
            info = read_json(file, error=DataError)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError("is missing: no finished dataset of pi0-cache --to arrayrecord is there", file) from error
    if info.get("format") != FORMAT or info.get("revision") != REVISION:
        found = str(info.get("format") or info.get("codebase_version") or "another format")
        raise DataError(
            f"is of {found!r:.80}, revision {info.get('revision')!s:.20}; expected {FORMAT} {REVISION}", file
        )
    size, features = info.get("size"), info.get("features")
    try:
        Encoding(info["encoding"])
        sizes = size is None or (len(size) == 2 and all(type(n) is int and 0 < n <= 2**16 for n in size))
        named = isinstance(info["index"], str) and isinstance(info["files"], dict) and type(info["frames"]) is int
        known = all(isinstance(f["dtype"], str) and isinstance(f["shape"], list) for f in features.values())
        if not (sizes and named and known and isinstance(info["fps"], int | float)):
            raise ValueError("fields of other types than expected")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"is damaged: {error!r:.200}; {_MAKE_AGAIN}", file) from error
    return info


def _size(info: dict[str, Any]) -> tuple[int, int] | None:
    return tuple(info["size"]) if info["size"] else None  # type: ignore[return-value]


def open_index(root: Path, info: dict[str, Any]) -> Index:
    """The index of a folder; in a bucket, it is fetched and checked by its checksums first. Raises DataError."""
    folder = root / INFO
    try:
        local = folder = _below(root, info["index"])
        if is_bucket(root):
            before = fetched(str(folder))
            local = fetch(str(folder))
            if before is None:
                try:
                    _check_files(local, info["files"])
                except DataError:
                    delete(local)
                    raise
        for name, (size, _) in info["files"].items():
            if below(local, name).stat().st_size != size:
                raise DataError(f"has {below(local, name).stat().st_size} bytes; expected {size}", local / name)
        found = Index(local)
        _check_index(found, info)
        return found
    except DataError as error:
        raise DataError(f"{error.problem}; {_MAKE_AGAIN}", error.file) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConnectionError):
            raise
        raise DataError(f"the index is damaged: {error}; {_MAKE_AGAIN}", folder) from error


def _check_files(folder: Path, files: dict[str, Any]) -> None:
    for name, (_, checksum) in files.items():
        file = below(folder, name)
        if not file.exists() or digest(file, "sha256") != checksum:
            raise DataError("is missing, or does not match its checksum", file)


def _check_index(index: Index, info: dict[str, Any]) -> None:
    """Raise ValueError where the arrays do not go together."""
    lengths, about, columns = index.lengths, index.about, index.about["columns"]
    numbered = [*about["tasks"], *((n, text) for n, texts in about["instructions"] for text in texts)]
    texts = [text for texts in about["texts"].values() for text in texts]
    if not (all(type(n) is int and isinstance(text, str) for n, text in numbered) and about["problems"] == []):
        raise ValueError("its texts are no texts by number")
    if not all(isinstance(text, str) for text in (*texts, *columns)):
        raise ValueError("its columns have no names, or texts that are none")
    whole = all(array.ndim == 1 and array.dtype == np.int64 for array in (index.numbers, lengths))
    if not whole or len(index.numbers) != len(lengths) or not len(lengths) or int(lengths.min()) < 1:
        raise ValueError("its episodes have no lengths")
    frames = int(lengths.sum())
    if int(lengths.max()) > MAX_FRAMES or frames != info["frames"] or len(np.unique(index.numbers)) < len(lengths):
        raise ValueError(f"its episodes have {frames} frames, or one is there twice; {info['frames']} were expected")
    vectors = {name for name, feature in info["features"].items() if feature["dtype"] != "image"}
    missing = {*vectors, *PLACE, "timestamp", "task_index"} - {*columns}
    if missing:
        raise ValueError(f"it has no columns {sorted(missing)}")
    for name in columns:
        array = index.array(name)
        if array.shape[:1] != (frames,) or array.dtype.kind not in "biuf" or (name in vectors) > (array.ndim == 2):
            raise ValueError(f"its column {name!r:.80} is {array.dtype} {list(array.shape)}")


def read_spans(spans: Sequence[tuple[Path, int, int]]) -> list[bytes]:
    """The bytes of files from `start` to before `end`, without those that a file does not have.

    Spans of a file that are at most MAX_GAP apart are read together, and in buckets all at the same time. Raises
    DataError for a file that is missing, ConnectionError where a bucket cannot be read.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(spans)), key=lambda i: (str(spans[i][0]), *spans[i][1:])):
        file, start, _ = spans[i]
        last = groups[-1] if groups else []
        if last and spans[last[0]][0] == file and start - max(spans[j][2] for j in last) <= MAX_GAP:
            last.append(i)
        else:
            groups.append([i])
    whole = [(spans[g[0]][0], spans[g[0]][1], max(spans[i][2] for i in g)) for g in groups]
    found: list[bytes] = [b""] * len(spans)
    for group, (_, begin, _), data in zip(groups, whole, _read(whole), strict=True):
        for i in group:
            found[i] = data[spans[i][1] - begin : spans[i][2] - begin]
    return found


def _read(spans: Sequence[tuple[Path, int, int]]) -> Iterable[bytes]:
    if not spans or not is_bucket(spans[0][0]):
        return [_read_local(*span) for span in spans]
    names, starts, ends = zip(*((str(file), start, end) for file, start, end in spans), strict=True)
    with requests(f"cannot read {names[0]}"):
        found = filesystem_of(spans[0][0]).cat_ranges(list(names), list(starts), list(ends), on_error="return")
        for i, data in enumerate(found):
            if isinstance(data, FileNotFoundError):
                raise DataError("the file is missing", names[i]) from data
            if isinstance(data, Exception):
                if str(getattr(data, "code", "")) != "416":  # the file ends before
                    raise data
                found[i] = b""
    return found


def _read_local(file: Path, start: int, end: int) -> bytes:
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read(end - start)
    except FileNotFoundError as error:
        raise DataError("the file is missing", file) from error


_below = functools.lru_cache(2**14)(below)  # which resolves links: slow, and many episodes share a file
