"""The report of a rollout as one self-contained HTML file, without scripts; `to_html`."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pi0 import __version__
from pi0.look import GREEN, ORANGE, STYLE, page
from pi0_eval.outcomes import Episode

MOST_VIDEO = 64 << 20  # bytes of videos that are put into the file; others are linked to
COLORS = {"success": GREEN, "failure": ORANGE, "error": "#7a1f00"}
OWN = """
.bar { position: relative; width: 16rem; height: .9rem; background: #eee; }
.bar i { position: absolute; top: .3rem; height: .3rem; background: #9fd8c6; }
.bar b { position: absolute; top: 0; width: 3px; height: .9rem; background: #006b4e; }
.cells span { display: inline-block; width: .9rem; height: .9rem; margin: 1px; }
video { max-width: min(36rem, 100%); }
"""


def to_html(
    folder: Path, settings: Mapping[str, Any], episodes: Sequence[Episode], rows: Sequence[Mapping[str, Any]]
) -> str:
    """Success rates with intervals, every episode's outcome, videos, errors and settings."""
    policy = ", ".join(f"{key} {value}" for key, value in settings["policy"].items())
    parts = [
        f"<h1>Rollout</h1><p><code>{escape(policy)}</code></p>",
        "<table><tr><th>task</th><th>episodes</th><th>success</th><th>95 % interval (Wilson)</th><th></th>"
        "<th>mean steps</th><th>errors</th></tr>",
        *map(_row, rows),
        "</table><h2>Episodes</h2>",
        f"<p>{_legend()}; the number of an episode and its steps are shown on hovering.</p><table>",
    ]
    for task in dict.fromkeys(episode.task for episode in episodes):
        cells = "".join(_cell(episode) for episode in episodes if episode.task == task)
        parts.append(f'<tr><th>{escape(task)}</th><td class="cells">{cells}</td></tr>')
    parts += ["</table>", *_videos(folder, episodes), *_errors(episodes)]
    parts.append(f"<h2>Settings</h2><pre>{escape(json.dumps(settings['plan'], indent=2))}</pre>")
    parts.append(f"<p>Written by pi0 {escape(__version__)}.</p>")
    return page("Rollout", STYLE + OWN, "\n".join(parts))


def _row(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    rate = "–" if row["rate"] is None else f"{row['rate']:.1%}"
    mark = "" if row["rate"] is None else f'<b style="left:{100 * row["rate"]:.1f}%"></b>'
    bar = f'<div class="bar"><i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>{mark}</div>'
    steps = "–" if row["steps"] is None else f"{row['steps']:.0f}"
    cells = (escape(row["task"]), row["episodes"], rate, f"{low:.1%} – {high:.1%}", bar, steps, row["errors"])
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _legend() -> str:
    return ", ".join(f'<span style="color:{color}">■</span> {outcome}' for outcome, color in COLORS.items())


def _cell(episode: Episode) -> str:
    title = f"{episode.episode}: {episode.outcome}, {episode.steps} steps"
    return f'<span style="background:{COLORS[episode.outcome]}" title="{escape(title)}"></span>'


def _videos(folder: Path, episodes: Sequence[Episode]) -> list[str]:
    found, used = [], 0
    for episode in episodes:
        file = folder / "videos" / f"{episode.index:06d}.mp4"
        if not file.exists():
            continue
        used += file.stat().st_size
        content = f"videos/{file.name}"
        if used <= MOST_VIDEO:
            content = "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()
        caption = f"{episode.task}, episode {episode.episode}: {episode.outcome}, {episode.steps} steps"
        video = f'<video controls muted preload="metadata" src="{content}"></video>'
        found.append(f"<figure>{video}<figcaption>{escape(caption)}</figcaption></figure>")
    head = "<h2>Videos</h2><p>Right: applied actions (blue) and the chunk that was predicted last (orange).</p>"
    return [head, *found] if found else []


def _errors(episodes: Sequence[Episode]) -> list[str]:
    wrong = [episode for episode in episodes if episode.outcome == "error"]
    listed = [f"<h3>{escape(e.task)}, episode {e.episode}</h3><pre>{escape(e.error)}</pre>" for e in wrong]
    return ["<h2>Errors of the simulator</h2>", *listed] if wrong else []
