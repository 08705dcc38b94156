"""Recorded episodes with a policy's predictions, for the Rerun viewer: `write_rerun`. The extra `rerun`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pi0.datasets.base import Dataset
from pi0.plugins import require_extra
from pi0.robots.robot import Robot
from pi0.storage import new_file


def write_rerun(file: Path, dataset: Dataset, robot: Robot, episodes: Sequence[Any], names: Sequence[str]) -> None:
    """Write `file`, whole or not at all: images, states, and recorded and predicted actions of every frame.

    `episodes` are of `pi0_eval.replay.replay`, all of the dataset's. Actions are `action/NAME/recorded` and
    `action/NAME/predicted`, of `names` [A] and in the robot's units, on the timelines `frame` (over all episodes) and
    `time` in seconds of an episode; images are `camera/NAME`, as JPEG.
    Raises MissingExtraError.
    """
    require_extra("rerun", "rerun")
    import rerun

    with new_file(file) as temporary:
        recording = rerun.RecordingStream("pi0-replay", recording_id=file.stem)
        recording.save(temporary)
        index = 0
        for episode in episodes:
            for step in range(len(episode.recorded)):
                frame = dataset[index]
                recording.set_time("frame", sequence=index)
                recording.set_time("time", duration=step / dataset.fps)
                if step == 0:
                    recording.log("task", rerun.TextLog(f"episode {episode.episode}: {episode.task}"))
                for key in dataset.cameras:
                    name = key.rpartition(".")[2]
                    recording.log(f"camera/{name}", rerun.Image(frame[key]).compress(jpeg_quality=90))
                for key in robot.state_keys(frame):
                    recording.log(f"state/{key.rpartition('.')[2]}", rerun.Scalars(frame[key]))
                for dim, name in enumerate(names):
                    recording.log(f"action/{name}/recorded", rerun.Scalars(episode.recorded[step, dim]))
                    recording.log(f"action/{name}/predicted", rerun.Scalars(episode.predicted[0, step, dim]))
                index += 1
        recording.flush()
        recording.disconnect()
