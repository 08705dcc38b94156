"""Convert a training run to the other framework, with all it needs to go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from convert.checkpoints import Checkpoint, open_checkpoint, write_checkpoint
from convert.checksums import sign
from convert.layouts.layout import Layout
from convert.layouts.registry import find_layout
from convert.tensors import CheckpointError, Tensor, pieces, same_bytes
from convert.training_state import FRAMEWORKS, TrainingState, read_state, run_of, write_state
from pi0.assets import CHECKSUMS
from pi0.storage import SCHEMES, as_path, below, new_folder
from pi0.training.workdir import FILES

MARKER = ("checkpoints", f"checkpoints/*/{CHECKSUMS}")  # the latter is uploaded last
KEPT = ("data.json", "metrics.jsonl")  # files of a run's folder that a converted one has too


def convert_run(
    source: str | Path,
    target: str | Path,
    *,
    to: str | Layout,
    step: int | None = None,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> Checkpoint:
    """Convert the newest checkpoint of a run, or that of `step`, to a run in `target` of the other framework.

    `to` is the layout "pi0_jax" or "pi0_torch". Weights, moving average, trained parameters, the optimizer's tensors
    and the number of updates go along byte for byte, and the run's config, which training goes on with. Returns the
    opened result. Raises CheckpointError or LayoutError, and FileExistsError where `target` exists; then nothing is
    left.
    """
    layout = find_layout(to)
    if layout.name not in FRAMEWORKS:
        raise ValueError(f"--with-training-state converts to {' or '.join(FRAMEWORKS)}; {layout.name} has no training")
    if str(source).partition("://")[0] in SCHEMES:
        raise ValueError(f"{source} is in a bucket; copy the run to this machine to convert it with its training state")
    checkpoint = open_checkpoint(source, step=step)
    if checkpoint.layout.name not in FRAMEWORKS:
        raise CheckpointError(f"{source} has the layout {checkpoint.layout.name}, which is none of our runs'")
    config, state = run_of(checkpoint), read_state(checkpoint)
    model = checkpoint.assets.model
    converted = state.in_layout(model, checkpoint.layout, layout)
    average = None
    if config.ema_decay is not None:
        weights = checkpoint.in_layout(layout)
        average = {name: weights[name] for name in converted.groups["params"]}
    run = checkpoint.folder.parent.parent
    log(f"step {checkpoint.assets.step}: {len(converted.groups['params'])} trained tensors, {', '.join(state.groups)}")
    with new_folder(as_path(target), overwrite, marker=MARKER, files=(*FILES, ".lock"), sources=[run]) as folder:
        made = folder / "checkpoints" / str(checkpoint.assets.step)
        made.mkdir(parents=True)
        write_checkpoint(checkpoint, made, layout)
        write_state(made, converted, average, layout)
        sign(made)
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        for name in KEPT:
            if (run / name).exists():
                shutil.copyfile(below(run, name), folder / name)  # a stranger's may be a link
        verify(checkpoint, state, made, layout)
    return open_checkpoint(target)


def verify(checkpoint: Checkpoint, state: TrainingState, made: Path, layout: Layout) -> None:
    """Raise CheckpointError where what was written, read again, is not what it was made of, byte for byte."""
    written = open_checkpoint(made, layout=layout)
    again = read_state(written).in_layout(checkpoint.assets.model, layout, checkpoint.layout)
    wanted = dict(_tensors(checkpoint, state))
    for name, tensor in _tensors(written, again):
        other = wanted.pop(name)
        for part in pieces(tensor) if tensor.sliced and other.sliced else [()]:
            if not same_bytes(tensor.read(part), other.read(part)):
                raise CheckpointError(f"{made}: {name} differs from what was read from {checkpoint.folder}")
    if wanted or again.count != state.count:
        raise CheckpointError(f"{made} lacks {sorted(wanted)[:5]}, or has another number of updates")


def _tensors(checkpoint: Checkpoint, state: TrainingState) -> Iterator[tuple[str, Tensor]]:
    yield from checkpoint.ours.items()
    for name, part in state.groups.items():
        yield from ((f"{name}/{key}", tensor) for key, tensor in part.items())
