"""Annotations in JSONL files: the subtasks of episodes, and questions about images with their answers."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0.datasets.base import Dataset
from pi0.datasets.errors import DataError
from pi0.datasets.images import MAX_PIXELS, read_image
from pi0.datasets.json_lines import read_jsonl
from pi0.fetch import fetch
from pi0.storage import below


class AnnotatedDataset:
    """A dataset whose frames have the `subtask` of a JSONL file, empty where it has none.

    Each line is {"episode": number, "start_frame": first, "end_frame": last + 1, "subtask": text}; episodes that were
    not chosen are ignored. Raises DataError for spans that are empty, overlap or lie outside of their episode.
    """

    def __init__(self, dataset: Dataset, file: str | Path):
        self.dataset, file = dataset, fetch(file)
        lengths = {episode.index: episode.length for episode in dataset.every_episode}
        self._spans: dict[int, list[tuple[int, int, str]]] = {}  # by episode and in order: start, end, subtask
        for line, row in _rows(file, {"episode": int, "start_frame": int, "end_frame": int, "subtask": str}):
            episode, start, end = row["episode"], row["start_frame"], row["end_frame"]
            if not 0 <= start < end <= lengths.get(episode, 0):
                known = f"has {lengths[episode]}" if episode in lengths else "is not in the dataset"
                raise DataError(f"line {line}: frames {start} to {end} of an episode that {known}", file, episode)
            spans = self._spans.setdefault(episode, [])
            place = bisect.bisect(spans, (start,))
            if any(start < other[1] and other[0] < end for other in spans[max(place - 1, 0) : place + 1]):
                raise DataError(f"line {line}: frames {start} to {end} have a subtask already", file, episode)
            spans.insert(place, (start, end, row["subtask"].strip()))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Frame i of the dataset, with its `subtask`."""
        return self._annotated(self.dataset[i])

    def fetch(self, frames: Sequence[int]) -> dict[int, bytes]:
        """See `Dataset`."""
        return self.dataset.fetch(frames)

    def item(self, i: int, stored: bytes | None = None) -> dict[str, Any]:
        """See `Dataset`."""
        return self._annotated(self.dataset.item(i, stored))

    def _annotated(self, item: dict[str, Any]) -> dict[str, Any]:
        spans = self._spans.get(item["episode_index"], [])
        place = bisect.bisect(spans, (item["frame_index"], float("inf"))) - 1
        found = place >= 0 and item["frame_index"] < spans[place][1]
        return item | {"subtask": spans[place][2] if found else ""}


class Questions:
    """Questions about images, from a JSONL file of {"image": path, "question": text, "answer": text}.

    Paths are relative to the file and below its folder; the image is optional. An item has `image/<camera>` uint8
    [H, W, 3] (see `read_image`), `image_mask/<camera>`, `question` and `answer`. Raises DataError for damaged lines,
    and for images when read.
    """

    def __init__(self, file: str | Path, camera: str, max_pixels: int = MAX_PIXELS):
        self.file, self.camera, self.max_pixels = fetch(file), camera, max_pixels
        self.rows = list(_rows(self.file, {"question": str, "answer": str}, {"image": str}))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        line, row = self.rows[i]
        image = np.zeros((1, 1, 3), np.uint8)
        if "image" in row:
            try:
                image = read_image(below(self.file.parent, row["image"]), self.max_pixels)
            except ValueError as error:
                raise DataError(f"line {line}: {error}", self.file) from error
        return {
            f"image/{self.camera}": image,
            f"image_mask/{self.camera}": np.bool_("image" in row),
            "question": row["question"],
            "answer": row["answer"],
        }


def _rows(
    file: Path, required: dict[str, type], optional: dict[str, type] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered rows of a JSONL file, with exactly these fields. Raises DataError."""
    known = required | (optional or {})
    for line, row in read_jsonl(file):
        valid = isinstance(row, dict) and required.keys() <= row.keys() <= known.keys()
        if not valid or any(type(value) is not known[name] or value == "" for name, value in row.items()):
            fields = ", ".join(f"{name} ({type_.__name__})" for name, type_ in known.items())
            raise DataError(f"line {line} is {str(row)[:200]}; expected {fields}, not empty", file)
        yield line, row
