"""A small synthetic LeRobot dataset of any robot: smooth motions, and random images as PNG in the table."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pi0.robots.robot import Robot

TASKS = ["open the drawer", "push the puck to the goal"]


def write_recording(
    root: Path, robot: Robot, frames: int = 12, split: Mapping[str, Mapping[str, int]] | None = None
) -> Path:
    """Two episodes of the same motion, one task each, in LeRobot's format v3.0.

    `split` has columns, and their dimensions, instead of `observation.state` or `action`.
    """
    names = robot.cameras if robot.adapts_images else {model: name for name, model in robot.cameras.items()}.values()
    cameras = [f"observation.images.{name}" for name in names]  # of several names for a camera, one
    count, rng = len(TASKS) * frames, np.random.default_rng(0)
    time = np.tile(np.arange(frames), len(TASKS))
    episode = np.repeat(np.arange(len(TASKS)), frames)

    def motion(dims: int) -> np.ndarray:
        return (0.5 + 0.4 * np.sin(time[:, None] / 3 + np.arange(dims))).astype(np.float32)

    def png() -> dict[str, bytes | None]:
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    vectors: dict[str, np.ndarray] = {}
    for name, dim in (("observation.state", robot.state_dim), ("action", robot.action_dim)):
        parts = (split or {}).get(name, {name: dim})
        whole = np.split(motion(dim), np.cumsum(list(parts.values()))[:-1], axis=1)
        vectors |= dict(zip(parts, whole, strict=True))
    columns = {
        **{name: list(values) for name, values in vectors.items()},
        **{camera: [png() for _ in range(count)] for camera in cameras},
        "timestamp": (time / 10).astype(np.float32),
        "frame_index": time,
        "episode_index": episode,
        "index": np.arange(count),
        "task_index": episode,
    }
    features = {n: {"dtype": "float32", "shape": [x.shape[1]], "names": None} for n, x in vectors.items()}
    features |= {camera: {"dtype": "image", "shape": [30, 40, 3], "names": None} for camera in cameras}
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "total_frames": count,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "features": features,
    }
    episodes = {
        "episode_index": range(len(TASKS)),
        "length": [frames] * len(TASKS),
        "dataset_from_index": [i * frames for i in range(len(TASKS))],
        "data/chunk_index": [0] * len(TASKS),
        "data/file_index": [0] * len(TASKS),
    }
    tables = {
        "data/chunk-000/file-000.parquet": columns,
        "meta/episodes/chunk-000/file-000.parquet": episodes,
        "meta/tasks.parquet": {"task_index": range(len(TASKS)), "task": TASKS},
    }
    for name, table in tables.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({key: pa.array(list(values)) for key, values in table.items()}), root / name)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    return root
