"""Readers of recorded robot data."""

from pi0.datasets.cache import build_cache
from pi0.datasets.check import find_damage
from pi0.datasets.errors import DataError
from pi0.datasets.lerobot import Clip, Episode, LeRobotDataset, episode_numbers, open_dataset
from pi0.datasets.mixture import Mixture, split_episodes

__all__ = [
    "Clip",
    "DataError",
    "Episode",
    "LeRobotDataset",
    "Mixture",
    "build_cache",
    "episode_numbers",
    "find_damage",
    "open_dataset",
    "split_episodes",
]
