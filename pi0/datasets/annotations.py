"""Annotations in JSONL files: the subtasks of episodes, and questions about images with their answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pi0.datasets.base import Dataset, read_jsonl
from pi0.datasets.errors import DataError
from pi0.fetch import fetch


class AnnotatedDataset:
    """A dataset whose frames have the `subtask` of a JSONL file, empty where it has none.

    Each line is {"episode": number, "start_frame": first, "end_frame": last + 1, "subtask": text}; episodes that were
    not chosen are ignored. Raises DataError for spans that are empty, overlap or lie outside of their episode.
    """

    def __init__(self, dataset: Dataset, file: str | Path):
        self.dataset, file = dataset, fetch(file)
        lengths = {episode.index: episode.length for episode in dataset.every_episode}
        texts = {index: np.full(length, "", object) for index, length in lengths.items()}
        for line, row in _rows(file, {"episode": int, "start_frame": int, "end_frame": int, "subtask": str}):
            episode, start, end = row["episode"], row["start_frame"], row["end_frame"]
            if not 0 <= start < end <= lengths.get(episode, 0):
                known = f"has {lengths[episode]}" if episode in lengths else "is not in the dataset"
                raise DataError(f"line {line}: frames {start} to {end} of an episode that {known}", file, episode)
            if texts[episode][start:end].any():
                raise DataError(f"line {line}: frames {start} to {end} have a subtask already", file, episode)
            texts[episode][start:end] = row["subtask"].strip()
        self._texts = texts

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Frame i of the dataset, with its `subtask`."""
        item = self.dataset[i]
        return item | {"subtask": str(self._texts[item["episode_index"]][item["frame_index"]])}


class Questions:
    """Questions about images, from a JSONL file of {"image": path, "question": text, "answer": text}.

    Paths are relative to the file; the image is optional. An item has `image/<camera>` uint8 [H, W, 3],
    `image_mask/<camera>`, `question` and `answer`. Raises DataError for damaged lines, and for images when read.
    """

    def __init__(self, file: str | Path, camera: str):
        self.file, self.camera = fetch(file), camera
        self.rows = list(_rows(self.file, {"question": str, "answer": str}, {"image": str}))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        line, row = self.rows[i]
        image = np.zeros((1, 1, 3), np.uint8)
        if "image" in row:
            path = self.file.parent / row["image"]
            try:
                image = np.asarray(Image.open(path).convert("RGB"))
            except (OSError, UnidentifiedImageError) as error:
                raise DataError(f"line {line}: {path} cannot be read: {error}", self.file) from error
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
