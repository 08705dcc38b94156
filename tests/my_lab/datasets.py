"""A dataset format of another package: episodes in npz files. Named as "tests.my_lab.datasets:NpzDataset"."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pi0.datasets.base import Contents, Dataset, Episode
from pi0.datasets.errors import DataError


class NpzDataset(Dataset):
    """Files episode_<number>.npz of arrays [F, ...]: states, actions, uint8 images; and a `task`."""

    @classmethod
    def contents(cls, root: Path) -> Contents:
        episodes = []
        for file in sorted(root.glob("episode_*.npz")):
            with np.load(file) as arrays:
                columns = {name: array for name, array in arrays.items() if array.ndim > 1}
            number, length = int(file.stem.removeprefix("episode_")), len(next(iter(columns.values())))
            episodes.append(Episode(number, length, file))
        if not episodes:
            raise DataError(f"{root} has no episode_*.npz")
        dtypes = {name: "image" if array.dtype == np.uint8 else "float32" for name, array in columns.items()}
        features = {name: {"dtype": dtype, "shape": columns[name].shape[1:]} for name, dtype in dtypes.items()}
        return Contents(20, features, episodes)

    def prepare(self) -> None:
        self.tasks = {episode.index: str(np.load(episode.file)["task"]) for episode in self.every_episode}

    def read_columns(self, episode: Episode) -> dict[str, np.ndarray]:
        with np.load(episode.file) as arrays:
            columns = {name: arrays[name] for name in (*self.states, *self.actions)}
        return columns | {"task_index": np.full(episode.length, episode.index)}

    def decode(self, camera: str, position: int, frame: int) -> np.ndarray:
        with np.load(self.episodes[position].file) as arrays:
            return arrays[camera][frame]
