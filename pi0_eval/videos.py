"""Videos of episodes, with the predicted chunks beside the images: `write_video`."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pi0.plugins import require_extra
from pi0.storage import new_file
from pi0_eval.outcomes import Trajectory

HEIGHT, PLOT = 192, 288  # pixels of an image, and of the width of the plot beside it
APPLIED, PREDICTED, GRID = (30, 90, 160), (217, 95, 2), (210, 210, 210)
BEFORE, AFTER = 20, 20  # steps of the plot before and after the present one


def write_video(
    file: Path, frames: list[tuple[dict[str, Any], np.ndarray]], trajectory: Trajectory, fps: float
) -> None:
    """An H.264 video of an episode: its cameras, and the actions with the chunk that was predicted last.

    `frames` are pairs of an observation and the action taken in it. Actions are [A], in units of the robot.
    """
    require_extra("data", "av")
    import av

    actions = trajectory.actions
    low, high = actions.min(0), actions.max(0)
    with new_file(file) as temporary, av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "23", "preset": "veryfast"}
        for step, (observation, _) in enumerate(frames):
            image = draw_frame(observation, trajectory, step, low, high)
            if step == 0:
                stream.height, stream.width = image.shape[:2]
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def draw_frame(
    observation: dict[str, Any], trajectory: Trajectory, step: int, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """One frame, uint8 [H, W, 3] of even sizes: the cameras side by side, then a plot of each action dimension."""
    images = [v for v in observation.values() if isinstance(v, np.ndarray) and v.ndim == 3]
    parts = [
        np.asarray(Image.fromarray(v).resize((HEIGHT * v.shape[1] // v.shape[0] // 2 * 2, HEIGHT))) for v in images
    ]
    plot = Image.new("RGB", (PLOT, HEIGHT), "white")
    draw = ImageDraw.Draw(plot)
    chunk = int(np.searchsorted(trajectory.starts, step, side="right")) - 1
    start, predicted = int(trajectory.starts[chunk]), trajectory.chunks[chunk]
    dims = trajectory.actions.shape[1]
    for dim in range(dims):
        top, height = HEIGHT * dim / dims, HEIGHT / dims

        def points(
            values: np.ndarray, first: int, dim: int = dim, top: float = top, height: float = height
        ) -> list[Any]:
            span = max(float(high[dim] - low[dim]), 1e-6)
            found = []
            for i, value in enumerate(values):
                if -BEFORE <= first + i - step <= AFTER:
                    x = (first + i - step + BEFORE) / (BEFORE + AFTER) * (PLOT - 1)
                    y = top + (height - 5) * (1 - float(np.clip((value - low[dim]) / span, 0, 1))) + 2
                    found.append((x, y))
            return found

        draw.line([(0, top), (PLOT, top)], GRID)
        draw.line([(PLOT / 2, top), (PLOT / 2, top + height)], GRID)
        for values, first, color in ((predicted, start, PREDICTED), (trajectory.actions[: step + 1], 0, APPLIED)):
            if len(line := points(values[:, dim], first)) > 1:
                draw.line(line, color, 2)
    return np.concatenate([*parts, np.asarray(plot)], axis=1)
