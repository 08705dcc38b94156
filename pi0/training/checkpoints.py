"""What the checkpoints of a run have in common, whichever framework writes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pi0.assets import CHECKSUMS, COMMITTED
from pi0.storage import move, requests

BEST = "validation_loss"  # the metric that is lowest in the best checkpoint


@contextlib.contextmanager
def writing(folder: Path, newest: Callable[[], int | None], *errors: type[Exception]) -> Iterator[None]:
    """Raise OSError that says what is left, where a checkpoint cannot be written; `newest` gives the newest step.

    `errors` are what is raised there beside OSError.
    """
    caught: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        with requests(f"no access to {folder}"):
            yield
    except caught as error:
        left = newest()
        there = "there is no other one" if left is None else f"the newest one is that of step {left}"
        raise OSError(
            f"a checkpoint cannot be written; {there}, and the run goes on from there when it is started again: {error}"
        ) from error


def put_aside(folder: Path, step: int, problem: str) -> None:
    """Rename a damaged checkpoint of the run's `folder`, and report it."""
    names = (f"damaged-{step}{i}" for i in ("", *(f"-{n}" for n in range(2, 1000))))
    aside = next(folder / name for name in names if not (folder / name).exists())
    print(f"checkpoint {step} is damaged and put aside as {aside.name}: {problem}")
    move(folder / str(step), aside, last=[COMMITTED, CHECKSUMS])
