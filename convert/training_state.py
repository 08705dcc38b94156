"""The state of a training run, beside the weights: trained parameters, the optimizer's tensors, and how many updates.

In memory it has groups of tensors by the parameter's name: `params`, and of the optimizer `mu` and `nu`, or `trace`.
The moving average, where there is one, is among the weights of the checkpoint. It goes through the same layout tables
as weights do; of frozen parameters there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert.checkpoints import STATE_FILE, TRAIN_STATE, Checkpoint
from convert.formats.orbax import read_orbax, write_orbax
from convert.formats.safetensors import read_safetensors, write_safetensors
from convert.layouts.layout import Layout
from convert.layouts.registry import LAYOUTS
from convert.tensors import CheckpointError, Tensor
from pi0.config import ModelConfig
from pi0.parameters import LayoutError
from pi0.run_config import RunConfig

OPTIMIZERS = {"adamw": ("mu", "nu"), "sgd": ("trace",)}  # the optimizer's groups
# Where optax's chains have them, by the optimizer: the place of its tensors, those of the number of updates, and those
# of transformations without a state.
CHAINS = {
    "adamw": ("opt_state/1", ("opt_state/1", "opt_state/3"), ("opt_state/0", "opt_state/2")),
    "sgd": ("opt_state/0", ("opt_state/1",), ()),
}


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """The number of updates, and tensors by group and the name of the parameter in a layout."""

    count: int
    groups: dict[str, dict[str, Tensor]]

    def in_layout(self, model: ModelConfig, source: Layout, target: Layout) -> TrainingState:
        """The state by the names of another layout."""
        groups = {name: in_layout(model, group, source, target) for name, group in self.groups.items()}
        return TrainingState(self.count, groups)


def group(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix` and a slash, without it."""
    start = f"{prefix}/"
    return {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}


def run_of(checkpoint: Checkpoint) -> RunConfig:
    """The config of the run that wrote a checkpoint. Raises CheckpointError where it is of none."""
    if checkpoint.assets.training is None or checkpoint.assets.step is None:
        raise CheckpointError(f"{checkpoint.folder} has no state of training: it was not written by pi0-train")
    return RunConfig.from_dict(checkpoint.assets.training)


def read_state(checkpoint: Checkpoint) -> TrainingState:
    """The state in a checkpoint of a run, in its layout, read lazily. Raises CheckpointError where it has none."""
    folder, names = checkpoint.folder, ("params", *OPTIMIZERS[run_of(checkpoint).optimizer.name])
    if not (folder / TRAIN_STATE).is_dir():
        raise CheckpointError(
            f"{folder} has no {TRAIN_STATE}: it is no checkpoint of a training run, or without its state"
        )
    if checkpoint.layout.format == "safetensors":
        tensors = read_safetensors(folder / STATE_FILE)
        groups, counts = {name: group(tensors, name) for name in names}, ["count"]
    else:
        tensors = read_orbax(folder / TRAIN_STATE)
        place, where, _ = CHAINS[run_of(checkpoint).optimizer.name]
        groups = {name: group(tensors, name if name == "params" else f"{place}/{name}") for name in names}
        counts = [f"{one}/count" for one in where]
    missing = [name for name in counts if name not in tensors] + [name for name in names if not groups[name]]
    if missing:
        raise CheckpointError(f"{folder / TRAIN_STATE} lacks {', '.join(missing)}")
    return TrainingState(int(np.asarray(tensors[counts[0]].read(())).reshape(-1)[0]), groups)


def write_state(folder: Path, state: TrainingState, average: Mapping[str, Tensor] | None, layout: Layout) -> None:
    """Write the state, by the names of `layout`, into a checkpoint's folder, as a run of that framework does.

    `average` are the tensors of the moving average of the parameters, where there is one.
    """
    if layout.format == "safetensors":
        tensors = {"count": Tensor.of(np.array([state.count], np.int64))}
        tensors |= {f"{name}/{key}": t for name, part in state.groups.items() for key, t in part.items()}
        (folder / STATE_FILE).parent.mkdir()
        write_safetensors(folder / STATE_FILE, tensors)
        return
    place, counts, empty = CHAINS["sgd" if "trace" in state.groups else "adamw"]
    tensors = {f"{one}/count": Tensor.of(np.array(state.count, np.int32)) for one in counts}
    groups = state.groups | ({} if average is None else {"ema": dict(average)})
    for name, part in groups.items():
        prefix = name if name in ("params", "ema") else f"{place}/{name}"
        tensors |= {f"{prefix}/{key}": tensor for key, tensor in part.items()}
    write_orbax(folder / TRAIN_STATE, tensors, empty=[*empty, *(["ema"] if average is None else [])])


def in_layout(config: ModelConfig, tensors: Mapping[str, Tensor], source: Layout, target: Layout) -> dict[str, Tensor]:
    """Tensors of some of the parameters, by the names of one layout, in another one, read lazily.

    `source` and `target` are layouts whose tensors are each of one parameter. Raises LayoutError for a parameter of
    which only a part is there, and for what the model has not.
    """
    origins, shapes = source.origins(config), source.shapes(config)
    unknown = sorted(tensors.keys() - origins.keys())
    some = {origins[name] for name in tensors if name in origins}
    missing = sorted(name for name, ours in origins.items() if ours in some and name not in tensors)
    if unknown or missing:
        raise LayoutError(f"a training state has unknown tensors {unknown[:5]}, and lacks {missing[:5]}")

    def zeros(shape: tuple[int, ...]) -> Tensor:
        return Tensor.of(np.broadcast_to(np.zeros((), np.float32), shape))

    ours = source.to_ours(config, {name: tensors.get(name) or zeros(shape) for name, shape in shapes.items()})
    names = target.origins(config)
    return {name: tensor for name, tensor in target.from_ours(config, ours).items() if names[name] in some}


FRAMEWORKS = {name: LAYOUTS[name] for name in ("pi0_jax", "pi0_torch")}  # the layouts of runs
