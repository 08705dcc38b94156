"""The error raised for damaged recordings."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """Recordings are damaged or not supported: the problem, and the `file`, `episode` and `frame` that have it."""

    def __init__(
        self, problem: str, file: str | Path | None = None, episode: int | None = None, frame: int | None = None
    ):
        named = (None if file is None else str(file), _named("episode", episode), _named("frame", frame))
        place = ", ".join(name for name in named if name is not None)
        super().__init__(f"{place}: {problem}" if place else problem)
        self.problem, self.file, self.episode, self.frame = problem, file, episode, frame


def _named(what: str, number: int | None) -> str | None:
    return None if number is None else f"{what} {number}"
