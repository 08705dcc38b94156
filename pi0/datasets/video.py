"""Images by frame number, from video files and from encoded images in the rows of Parquet files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from av.video.reformatter import VideoReformatter

from pi0.datasets.errors import DataError
from pi0.datasets.images import MAX_PIXELS, check_size, read_image
from pi0.reading import require_regular

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"  # no playlists, which would open other files
# PyAV's since 17. Before, as LeRobot has it (av<16), the index is made of the packets, for which the file is read once.
HAS_INDEX = int(av.__version__.split(".")[0]) >= 17
ONE_THREAD = {"threads": 1} if HAS_INDEX else {}
MAX_GROUP = 2**30  # bytes of the images in a row group of a Parquet file: default of `EncodedImages.max_bytes`


class Video:
    """A video file, read by time: decodes on from the last frame read, or seeks where a keyframe lies between.

    The file is opened when first read, so a `Video` can be pickled. `decoded` counts the frames that were decoded,
    those between a keyframe and the requested frame included.
    """

    def __init__(self, file: Path, fps: float, max_pixels: int = MAX_PIXELS):
        self.file, self.fps, self.max_pixels, self.decoded = file, fps, max_pixels, 0
        self._half = 0.5 / fps
        self._container: Any = None
        self._frames: Any = None
        self._next = -1  # the number of the frame that is decoded next
        self._checked: set[tuple[float, float, int]] = set()
        self._converter = VideoReformatter()  # kept: a new one per image costs more than decoding

    def __reduce__(self) -> tuple[Any, ...]:
        return Video, (self.file, self.fps, self.max_pixels)

    def check(self, start: float, end: float, length: int) -> None:
        """Raise DataError unless `length` frames, one per period, lie from `start` to `end` seconds, all in the file.

        Reads only the file's index and decodes nothing.
        """
        self._open()
        if (start, end, length) in self._checked:
            return
        first, last = np.searchsorted(self._times, (start - self._half, end - self._half))
        if last - first != length:
            problem = f"the video has {last - first} frames for this episode, the episode table says {length}"
            raise DataError(problem, self.file, frame=min(int(last - first), length))
        cut = np.flatnonzero(self._ends[first:last] > self._size)
        if len(cut):
            problem = (
                f"the file is cut off: it has {self._size} bytes and this frame ends at {self._ends[first + cut[0]]}"
            )
            raise DataError(problem, self.file, frame=int(cut[0]))
        late = np.abs(self._times[first:last] - start - np.arange(length) / self.fps)
        if (late >= self._half).any():
            frame = int(np.argmax(late >= self._half))
            problem = f"it is shown at {self._times[first + frame] - start:.3f} s, not at {frame / self.fps:.3f} s"
            raise DataError(problem, self.file, frame=frame)
        self._checked.add((start, end, length))

    def frame(self, time: float) -> np.ndarray:
        """The image uint8 [H, W, 3] within half a frame period of `time` seconds. Raises DataError where there is none.

        Stored times are rounded to the file's time base, and the requested time is a sum of floats, so neither is
        exact; half a period still separates every frame from its neighbors.
        """
        self._open()
        number = int(np.searchsorted(self._times, time - self._half))
        if number == len(self._times):
            raise DataError(f"the video ends before {time:.3f} s", self.file)
        if self._times[number] >= time + self._half:
            raise DataError(f"no frame at {time:.3f} s; the nearest is at {self._times[number]:.3f} s", self.file)
        keyframe = self._keyframes[np.searchsorted(self._keyframes, number, side="right") - 1]
        try:
            if not keyframe <= self._next <= number:
                self._seek(self._times[keyframe], time)
            for frame in self._frames:
                self.decoded += 1
                if frame.time > time - self._half:
                    break
            else:
                raise DataError(f"the video cannot be decoded up to {time:.3f} s", self.file)
        except (OSError, av.FFmpegError) as error:
            self._next = -1
            raise DataError(f"cannot be decoded at {time:.3f} s: {error}", self.file) from error
        self._next = number + 1
        if frame.time >= time + self._half or frame.is_corrupt:
            self._next = -1
            raise DataError(f"the frame at {time:.3f} s is damaged", self.file)
        return self._converter.reformat(frame, format="rgb24", **ONE_THREAD).to_ndarray()

    def _open(self) -> None:
        """Open the file and read its index: time and end in bytes of every frame, and which frames are keyframes."""
        if self._container is not None:
            return
        try:
            require_regular(self.file)
            # "file:", as a name may contain a colon
            container = av.open(f"file:{self.file}", options={"format_whitelist": CONTAINERS})
        except (OSError, ValueError, av.FFmpegError) as error:
            raise DataError(f"cannot be opened: {error}", self.file) from error
        self._size = self.file.stat().st_size
        stream = container.streams.video[0] if container.streams.video else None
        if stream is not None:
            self._check_header(stream)
        entries = [] if stream is None else [entry for entry in _index_of(container, stream) if not entry.is_discard]
        if stream is None or stream.time_base is None or not stream.frames or not entries:
            raise DataError("has no index of its frames; write it as MP4: `ffmpeg -i FILE -c copy FILE.mp4`", self.file)
        # One thread: a forked process has none of the parent's threads, and would wait for them forever.
        stream.codec_context.thread_count = 1
        # The index has decoding times: presentation times but for their order and start.
        times = np.sort(np.array([_decoding_time(entry) for entry in entries], float))
        self._times = (times - times[0] + (stream.start_time or 0)) * float(stream.time_base)
        self._ends = np.array([entry.pos + entry.size for entry in entries])
        self._keyframes = np.flatnonzero([entry.is_keyframe for entry in entries])
        self._container = container

    def _check_header(self, stream: Any) -> None:
        """Raise DataError for frames that are too large or depth, or more of them than bytes."""
        try:
            check_size(stream.codec_context.width, stream.codec_context.height, self.max_pixels)
        except DataError as error:
            raise DataError(error.problem, self.file) from error
        pixels = stream.codec_context.format  # None where the header does not say
        if pixels is not None and len(pixels.components) == 1 and pixels.components[0].bits > 8:
            raise DataError(
                f"has mode {pixels.name}: 16-bit or depth, not 8-bit colors; leave this camera out", self.file
            )
        count = max(stream.frames, len(stream.index_entries) if HAS_INDEX else 0)
        if count > self._size:
            raise DataError(f"has {self._size} bytes for {count} frames", self.file)
        stream.codec_context.options = {"max_pixels": str(self.max_pixels)}  # a frame may differ from the header

    def _seek(self, keyframe: float, time: float) -> None:
        """Seek to the keyframe at `keyframe` seconds, or an earlier one if that is shown after `time` (an open GOP)."""
        stream = self._container.streams.video[0]
        for back in (0.0, 1.0, np.inf):
            target = max(keyframe + self._half / 2 - back, 0.0)  # after it, so that rounding does not miss it
            self._container.seek(int(target / stream.time_base), stream=stream, backward=True)
            self._frames = self._container.decode(stream)
            first = next(self._frames, None)
            if first is None or first.time < time + self._half:
                break
        self._frames = iter([]) if first is None else itertools.chain([first], self._frames)


def _index_of(container: Any, stream: Any) -> Any:
    """The entries of a video's index, or its packets, in the order of the file."""
    if HAS_INDEX:
        return stream.index_entries
    return [packet for packet in container.demux(stream) if packet.size]  # the last one is empty


def _decoding_time(entry: Any) -> int:
    return entry.timestamp if HAS_INDEX else entry.dts


class EncodedImages:
    """Encoded images (PNG, JPEG) in one column of a Parquet file, read by row; keeps the row group read last."""

    def __init__(self, file: Path, column: str, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_GROUP):
        self.file, self.column, self.max_pixels, self.max_bytes = file, column, max_pixels, max_bytes
        self._parquet: pq.ParquetFile | None = None
        self._group, self._encoded = -1, pa.array([], pa.binary())

    def __reduce__(self) -> tuple[Any, ...]:
        return EncodedImages, (self.file, self.column, self.max_pixels, self.max_bytes)

    def frame(self, row: int) -> np.ndarray:
        """The image of a row, uint8 [H, W, 3]. Raises DataError."""
        try:
            if self._parquet is None:
                require_regular(self.file)
                # repeated bytes stay in a dictionary: expanded, a small file may take any memory
                self._parquet = pq.ParquetFile(self.file, memory_map=True, read_dictionary=[f"{self.column}.bytes"])
                meta = self._parquet.metadata
                self._starts = np.cumsum([0] + [meta.row_group(g).num_rows for g in range(meta.num_row_groups)])
            group = int(np.searchsorted(self._starts, row, side="right")) - 1
            if group != self._group:
                self._group, self._encoded = group, self._read_group(self._parquet, group)
            encoded = self._encoded[row - int(self._starts[group])].as_py()
        except (OSError, ValueError, KeyError, IndexError, pa.ArrowException) as error:
            problem = error.problem if isinstance(error, DataError) else f"cannot be read: {error}"
            raise DataError(problem, self.file) from error
        if not isinstance(encoded, bytes):
            raise DataError(f"row {row} has no bytes in {self.column}", self.file)
        try:
            return read_image(encoded, self.max_pixels)
        except DataError as error:
            raise DataError(f"the image in row {row} of {self.column} {error.problem}", self.file) from error

    def _read_group(self, parquet: pq.ParquetFile, group: int) -> pa.ChunkedArray:
        meta = parquet.metadata.row_group(group)
        chunks = [meta.column(i) for i in range(meta.num_columns)]
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == f"{self.column}.bytes")
        if size > self.max_bytes:
            raise DataError(f"row group {group} has {size} bytes of {self.column}; at most {self.max_bytes} are read")
        return pc.struct_field(parquet.read_row_group(group, columns=[self.column])[self.column], "bytes")
