"""Decoded images of one camera by episode and frame, in memory or a folder that `pi0-cache` wrote; files kept open."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

MEMORY = "memory"  # instead of a folder


class OpenFiles(threading.local):
    """The image files that the current thread has opened: decoders and file positions are not shared."""

    def __init__(self) -> None:
        self.by_key: dict[tuple[Any, ...], Any] = {}

    def __len__(self) -> int:
        return len(self.by_key)

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()


class FrameMemory:
    """The images that have been decoded so far. Pickling keeps none."""

    def __init__(self) -> None:
        self._images: dict[tuple[int, int], np.ndarray] = {}

    def __reduce__(self) -> tuple[type[FrameMemory], tuple[()]]:
        return FrameMemory, ()

    def read(self, episode: int, frame: int) -> np.ndarray | None:
        """The image [H, W, 3], read-only, or None."""
        return self._images.get((episode, frame))

    def store(self, episode: int, frame: int, image: np.ndarray) -> None:
        """Keep an image uint8 [H, W, 3]."""
        image.flags.writeable = False
        self._images[episode, frame] = image


class FrameCache:
    """The images in a folder: `frames.npy`, uint8 [F, H, W, 3], mapped into memory, and `about.json` with the first
    row of each episode. Pickling keeps the folder's path.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._frames = np.asarray(np.load(folder / "frames.npy", mmap_mode="r"))
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self._starts = {int(n): start for n, start in about["starts"].items()}

    def __reduce__(self) -> tuple[type[FrameCache], tuple[Path]]:
        return FrameCache, (self.folder,)

    def read(self, episode: int, frame: int) -> np.ndarray | None:
        """The image [H, W, 3], read-only, or None where the episode was damaged when the cache was built."""
        start = self._starts.get(episode)
        return None if start is None else self._frames[start + frame]

    def store(self, episode: int, frame: int, image: np.ndarray) -> None:
        """Do nothing with an image [H, W, 3]: the folder was complete when it was written."""
