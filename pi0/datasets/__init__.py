"""Readers of recorded robot data."""

from pi0.datasets.annotations import Annotated, Questions
from pi0.datasets.cache import build_cache
from pi0.datasets.check import find_damage
from pi0.datasets.errors import DataError
from pi0.datasets.lerobot import Clip, Episode, LeRobotDataset
from pi0.datasets.mixture import Mixture, split_episodes

__all__ = [
    "Annotated",
    "Clip",
    "DataError",
    "Episode",
    "LeRobotDataset",
    "Mixture",
    "Questions",
    "build_cache",
    "find_damage",
    "split_episodes",
]
