"""Plots: loss curves, predicted against recorded actions, camera images, distributions, attention masks, latencies.

matplotlib, of the extra `plots`, is imported when something is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0 import masks
from pi0.look import COLORS, DASHES, RECORDED
from pi0.plugins import require_extra


def plot_loss(metrics_file: Path, target: Path) -> None:
    """Training and validation loss by step, from `metrics.jsonl`, to a PNG."""
    rows = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").split("\n") if line]
    figure, axis = _subplots(figsize=(7, 4))
    for name, color, style in (("loss", COLORS[0], "-"), ("validation_loss", COLORS[1], "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=color, label=name.replace("_", " "))
    axis.set(xlabel="step", ylabel="flow-matching loss", ylim=(0, None), title="Training")
    axis.legend()
    axis.grid(alpha=0.3)
    _save(figure, target)


def plot_actions(
    recorded: np.ndarray, predicted: Mapping[str, np.ndarray], names: Sequence[str], target: Path, title: str
) -> None:
    """Recorded [F, A] against predicted actions [F, A] by name of the policy, one panel per dimension."""
    dims = recorded.shape[1]
    figure, axes = _subplots(dims, 1, figsize=(9, 1.8 * dims), sharex=True, squeeze=False)
    for d, axis in enumerate(axes[:, 0]):
        axis.plot(recorded[:, d], color=RECORDED, label="recorded")
        for i, (name, actions) in enumerate(predicted.items()):
            style = DASHES[(i + 1) % len(DASHES)]  # told apart in black and white too
            axis.plot(actions[:, d], style, color=COLORS[i % len(COLORS)], label=name)
        axis.set_ylabel(names[d])
        axis.grid(alpha=0.3)
    axes[0, 0].legend(loc="upper right", ncols=1 + len(predicted))
    axes[0, 0].set_title(title)
    axes[-1, 0].set_xlabel("frame")
    _save(figure, target)


def plot_cameras(images: Mapping[str, np.ndarray], target: Path) -> None:
    """A few frames of each camera, uint8 [B, H, W, 3] by its name, one row for each camera."""
    count = len(next(iter(images.values())))
    figure, axes = _subplots(len(images), count, figsize=(2 * count, 2.2 * len(images)), squeeze=False)
    for row, (name, frames) in zip(axes, images.items(), strict=True):
        for axis, frame in zip(row, frames, strict=True):
            axis.imshow(frame)
            axis.set_axis_off()
        row[0].set_title(name, fontsize=9, loc="left")
    _save(figure, target)


def plot_distributions(panels: Mapping[str, tuple[np.ndarray, np.ndarray, float, float]], target: Path) -> None:
    """Histograms by title: edges [E + 1] and counts [E], and the quantiles q01 and q99."""
    rows = -(-len(panels) // 4)
    figure, axes = _subplots(rows, 4, figsize=(12, 2.2 * rows), squeeze=False)
    for axis, (title, (edges, counts, *quantiles)) in zip(axes.flat, panels.items(), strict=False):
        axis.stairs(counts / counts.sum(), edges, fill=True, color=COLORS[0])
        for quantile in quantiles:
            axis.axvline(quantile, color=COLORS[1], linestyle="--")
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.supxlabel("bars: share of all values, in the model's units; dashed: 1 % and 99 % quantiles", fontsize=9)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    _save(figure, target)


def plot_masks(target: Path) -> None:
    """The attention mask of each stage of π0.5's recipe, queries in rows and keys in columns, as `pi0.masks` has it."""
    stages = {
        "pre-training": (masks.PREFIX, masks.SUBTASK, masks.FAST),
        "post-training": masks.GROUPS,
        "inference": (masks.PREFIX, masks.SUBTASK, masks.ACTIONS),
    }
    sizes = {masks.PREFIX: 6, masks.SUBTASK: 4, masks.FAST: 4, masks.ACTIONS: 4}
    figure, axes = _subplots(1, len(stages), figsize=(15, 5.5))
    from matplotlib.colors import ListedColormap

    colors = ListedColormap(["white", *COLORS[:2]])
    for axis, (stage, groups) in zip(axes, stages.items(), strict=True):
        counts = [sizes[group] for group in groups]
        tokens = np.repeat(groups, counts)[None]
        attended = masks.attention_mask(tokens, np.ones(tokens.shape, bool))[0]
        insulated = attended & (tokens[0] == masks.ACTIONS)[:, None] & (tokens[0] != masks.ACTIONS)
        axis.imshow(np.where(attended, 1 + insulated, 0), cmap=colors, vmin=0, vmax=2)
        ends = np.cumsum(counts)
        for end in ends[:-1]:
            axis.axhline(end - 0.5, color="black", linewidth=1)
            axis.axvline(end - 0.5, color="black", linewidth=1)
        names = [masks.NAMES[group] for group in groups]
        axis.set_xticks(ends - np.array(counts) / 2 - 0.5, names, rotation=20)
        axis.set_yticks(ends - np.array(counts) / 2 - 0.5, names)
        axis.set_title(stage)
    figure.suptitle(
        "queries (rows) attend to the colored keys (columns); orange: without gradient, with knowledge insulation"
    )
    _save(figure, target)


def plot_latency(times: Mapping[str, tuple[float, float]], target: Path) -> None:
    """Median latency and roofline in milliseconds by name, as nested bars."""
    figure, axis = _subplots(figsize=(9, 1 + 0.5 * len(times)))
    places = range(len(times) - 1, -1, -1)
    latencies, rooflines = zip(*times.values(), strict=True)
    axis.barh(places, latencies, color=COLORS[0], label="median latency")
    axis.barh(places, rooflines, height=0.4, color=COLORS[1], label="roofline")
    for place, latency in zip(places, latencies, strict=True):
        axis.text(latency, place, f" {latency:.1f}", va="center", fontsize=8)
    axis.set_yticks(places, times.keys(), fontsize=8)
    axis.set(xlabel="milliseconds", title="Sampling", xlim=(0, 1.1 * max(latencies)))
    axis.legend()
    _save(figure, target)


def plot_layer_errors(errors: Mapping[str, float], curve: Mapping[int, float], target: Path, title: str) -> None:
    """Action errors in percent of the layers that are quantized alone, by name, the worst 20 of each part of the model.

    `curve` has the error by the number of the worst layers that stay wide; a panel of its own, where there are any.
    """
    parts = list(dict.fromkeys(name.partition(".")[0] for name in errors))
    color = {part: COLORS[i % len(COLORS)] for i, part in enumerate(sorted(parts))}
    worst = list(errors.items())[:20]
    figure, axes = _subplots(1, 2 if curve else 1, figsize=(13 if curve else 8, 1.5 + 0.24 * len(worst)), squeeze=False)
    axis = axes[0, 0]
    for place, (name, error) in enumerate(reversed(worst)):
        axis.barh(place, error, color=color[name.partition(".")[0]])
    axis.set_yticks(range(len(worst)), [name for name, _ in reversed(worst)], fontsize=7)
    axis.set(xlabel="mean action error, % of the recorded range", title="each layer alone")
    if curve:
        counts = sorted(curve)
        axes[0, 1].plot(counts, [curve[count] for count in counts], "o-", color=COLORS[0])
        axes[0, 1].set(
            xlabel="worst layers kept wide", ylabel="mean action error, %", ylim=(0, None), title="all others"
        )
        axes[0, 1].grid(alpha=0.3)
    figure.suptitle(title, fontsize=9)
    _save(figure, target)


def _subplots(rows: int = 1, columns: int = 1, figsize: tuple[float, float] = (6, 4), **options: Any) -> Any:
    """A figure and its axes, without pyplot, which keeps figures and needs a backend. Raises MissingExtraError."""
    require_extra("plots", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize)
    return figure, figure.subplots(rows, columns, **options)


def _save(figure: Any, target: Path) -> None:
    figure.tight_layout()
    figure.savefig(target, dpi=120)
