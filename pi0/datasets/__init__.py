"""Readers of recorded robot data."""

from pi0.datasets.lerobot import Clip, DatasetError, Episode, LeRobotDataset

__all__ = ["Clip", "DatasetError", "Episode", "LeRobotDataset"]
