"""Whole checkpoints of any layout: found out, opened and checked, written. Needs no jax.

Nothing is read before it is asked for, and nothing is written before the whole checkpoint has been found to fit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.formats.npz import read_npz
from convert.formats.orbax import read_orbax, write_orbax
from convert.formats.safetensors import read_safetensors, read_sharded, write_safetensors
from convert.fresh import source_config, with_fresh
from convert.layouts import LAYOUTS
from convert.layouts.layout import Layout, infer_sizes
from convert.sidecars import WRITERS, norm_stats_files, read_assets, read_model
from convert.tensors import CheckpointError, Tensor
from pi0.assets import Assets
from pi0.config import GemmaConfig, ModelConfig, VisionConfig
from pi0.families import FAMILIES
from pi0.fetch import fetch
from pi0.parameters import LayoutError
from pi0.variants import get_variant


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint that has been found to fit its layout: our parameters, lazily, and what lies beside them.

    `norm_stats` are the files of all norm stats beside it, by asset id; `assets` has those of one. `fresh` names the
    parameters that are newly initialized.
    """

    folder: Path
    layout: Layout
    assets: Assets
    ours: dict[str, Tensor]
    norm_stats: dict[str, Path] = dataclasses.field(default_factory=dict)
    fresh: list[str] = dataclasses.field(default_factory=list)

    def in_layout(self, layout: str) -> dict[str, Tensor]:
        """The tensors of another layout, read lazily."""
        return LAYOUTS[layout].from_ours(self.assets.model, self.ours)


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a checkpoint's file or folder `weights` holds, by the names there; what goes with it lies in `beside`."""

    folder: Path
    weights: Path
    beside: Path
    tensors: dict[str, Tensor]


def read_tensors(
    source: str | Path, *, step: int | None = None, ema: bool = True, dtype: np.dtype | None = None
) -> Stored:
    """The tensors in a checkpoint's files, whatever they are; see `open_checkpoint`. Raises CheckpointError."""
    path = fetch(source)
    if path.suffix == ".npz":
        return Stored(path, path, path, read_npz(path))
    folder = _step_folder(path, step)
    if not ema:
        return Stored(folder, folder / "train_state", folder, _trained(folder))
    for file, read in (("model.safetensors", read_safetensors), ("model.safetensors.index.json", read_sharded)):
        if (folder / file).exists():
            return Stored(folder, folder / file, folder, read(folder / file))
    for params, beside in ((folder / "params", folder), (folder, folder.parent)):
        if (params / "_METADATA").exists():
            return Stored(folder, params, beside, read_orbax(params, dtype))
    raise CheckpointError(f"{folder} holds neither model.safetensors (or its index) nor an Orbax params folder")


def open_checkpoint(
    source: str | Path,
    config: ModelConfig | None = None,
    *,
    step: int | None = None,
    ema: bool = True,
    asset_id: str | None = None,
    fresh: int | None = None,
    dtype: np.dtype | None = None,
) -> Checkpoint:
    """Open a checkpoint of any layout, checked against its table; weights are not read yet.

    `source`: a folder, `gs://` or `hf://`; a folder that holds an Orbax `params` folder, that folder itself, one with
    `model.safetensors` or shards of it, an `.npz` file, or a training run's folder (its newest step, or `step`;
    without `ema`, the parameters that are trained and not their moving average).

    The layout follows from the names of the tensors, the model config from a `config.json` of ours, openpi's or
    LeRobot's; without one, sizes follow from the shapes, and what shapes do not say (horizon, text length, cameras) is
    that of the released models. `config` overrides both. `asset_id` chooses among several norm stats.

    With `dtype`, all parameters are read as that, each value rounded once.

    With the seed `fresh`, a `config` may have what the source has not at all, an action expert (PaliGemma's weights)
    or LoRA: that is newly initialized, and named in the result's `fresh`.

    Raises CheckpointError and LayoutError that name what is wrong.
    """
    stored = read_tensors(source, step=step, ema=ema, dtype=dtype)
    folder, tensors = stored.folder, stored.tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    layout, kind, lora = detect(shapes)
    for name, tensor in tensors.items():
        if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype != ml_dtypes.bfloat16:
            raise LayoutError(f"{folder}: {name} has dtype {tensor.dtype}; expected a floating-point one")
    assets = find_assets(stored, layout, kind, lora, config, asset_id)
    norm_stats = norm_stats_files(stored.beside)
    new: list[str] = []
    if fresh is None:
        ours = layout.to_ours(assets.model, tensors)
    else:
        (embedding,) = (rule.theirs for rule in layout.rules if rule.ours == "paligemma.embedding")
        rows = next((shape[0] for name, shape in shapes.items() if layout.spell(name) == embedding), 0)
        ours = layout.to_ours(source_config(assets.model, kind, lora, rows), tensors)
        ours, new = with_fresh(assets.model, ours, fresh)
    if dtype is not None:  # arrays of Orbax are that already
        ours = {name: tensor.cast(dtype) for name, tensor in ours.items()}
    return Checkpoint(folder, layout, assets, ours, norm_stats, new)


def find_assets(
    stored: Stored,
    layout: Layout,
    kind: str,
    lora: tuple[str, ...],
    config: ModelConfig | None = None,
    asset_id: str | None = None,
) -> Assets:
    """What goes with some weights: ours, or what openpi or LeRobot keep beside them. See `open_checkpoint`."""
    assets = Assets.load(stored.beside)
    if assets is None or asset_id not in (None, assets.asset_id):
        shapes = {name: tensor.shape for name, tensor in stored.tensors.items()}
        model = config or (assets and assets.model) or read_model(stored.beside, kind)
        return read_assets(stored.beside, model or infer_config(layout, kind, shapes, lora), asset_id)
    return assets if config is None else dataclasses.replace(assets, model=config)


def _step_folder(folder: Path, step: int | None) -> Path:
    """The checkpoint of a training run's folder; any other folder as it is."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the checkpoint's folder")
    steps = sorted(int(f.name) for f in (folder / "checkpoints").glob("*") if f.name.isdigit())
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has {steps or 'none'}")
    if not steps:
        return folder
    return folder / "checkpoints" / str(steps[-1] if step is None else step)


def _trained(folder: Path) -> dict[str, Tensor]:
    """The parameters in a checkpoint's training state, and those that were frozen, which are in `params` alone."""
    if not (folder / "train_state").exists():
        raise CheckpointError(f"{folder} has no train_state; only a training run's checkpoint has two sets of weights")
    state = read_orbax(folder / "train_state")
    trained = {name.removeprefix("params/"): tensor for name, tensor in state.items() if name.startswith("params/")}
    return read_orbax(folder / "params") | trained


def detect(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Layout, str, tuple[str, ...]]:
    """The layout, the kind of model and its experts with LoRA whose names fit `shapes` best.

    Raises LayoutError where none fits at all.
    """
    best, most = None, 0.0
    for layout in LAYOUTS.values():
        unused = {_stem(rule.theirs) for rule in layout.unused}
        found = {_stem(layout.spell(name)) for name in shapes} - unused
        for kind, lora in ((k, lora) for k in layout.kinds for lora in _lora_choices(layout, k)):
            names = {_stem(rule.theirs.replace("{l}", "0")) for rule in layout.rules_for(kind, lora)}
            score = len(names & found) / len(names | found)
            if score > most:
                best, most = (layout, kind, lora), score
    if best is None:
        raise LayoutError(f"no known layout has tensors like {sorted(shapes)[:5]}; known are {', '.join(LAYOUTS)}")
    return best


def _lora_choices(layout: Layout, kind: str) -> Iterator[tuple[str, ...]]:
    """The experts that may have low-rank updates, together: none first, then all of them."""
    yield ()
    if layout.has_lora:
        for count in range(len(FAMILIES[kind].experts), 0, -1):
            yield from itertools.combinations(FAMILIES[kind].experts, count)


def _stem(name: str) -> str:
    """The name with its layer number, if any, left open."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def infer_config(
    layout: Layout, kind: str, shapes: Mapping[str, tuple[int, ...]], lora: tuple[str, ...] = ()
) -> ModelConfig:
    """The model config that the shapes of a checkpoint say. Raises LayoutError where they do not say a size.

    LoRA's alpha is no shape: it is taken to be the rank, as in all of openpi's variants.
    """
    sizes = infer_sizes(layout.rules_for(kind, lora), {layout.spell(name): shape for name, shape in shapes.items()})
    vision, released = sizes["vision"], get_variant(kind)

    def gemma(scope: str) -> GemmaConfig:
        s = sizes[scope]
        if not {"n", "k", "h"} <= s.keys():
            raise LayoutError(
                f"the layout {layout.name} does not tell heads from head dim; a config.json of ours is "
                f"missing beside the weights: pass --model (config= in Python), for instance --model {kind}"
            )
        return GemmaConfig(s["d"], s["l"], s["m"], s["n"], s["k"], s["h"], s.get("r"))

    experts = {name: gemma(name) for name in FAMILIES[kind].experts}
    side = math.isqrt(vision["s"])
    if side**2 != vision["s"]:
        (name,) = (r.theirs for r in layout.rules_for(kind) if r.ours == "vision.position_embedding")
        raise LayoutError(f"{name} holds {vision['s']} positions, which are not a square image's; pass config=")
    resolution = (side * vision["p"], side * vision["p"])
    return dataclasses.replace(
        released,
        vision=VisionConfig(vision["d"], vision["l"], vision["m"], vision["n"], vision["p"]),
        paligemma=experts["paligemma"],
        action_expert=experts.get("action_expert"),
        vocab_size=sizes["paligemma"]["v"],
        image_resolution=resolution,
        action_dim=sizes["projections"]["a"] if "projections" in sizes else released.action_dim,
    )


def write_checkpoint(checkpoint: Checkpoint, folder: Path, layout: str) -> None:
    """Write a checkpoint into `folder` in another layout, with all that goes with it.

    That is our config, norm stats and references in `assets/`, and for layouts of other projects what their loaders
    need: their own config and processors, and zeros for the tensors that their models have and never use.
    """
    tensors, target = checkpoint.in_layout(layout), LAYOUTS[layout]
    assets, dtype = checkpoint.assets, checkpoint.ours["paligemma.embedding"].dtype
    if target.format == "safetensors":
        tensors |= target.unused_tensors(assets.model, dtype)
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    else:
        write_orbax(folder / "params", tensors, target.root)
    if layout in WRITERS:
        WRITERS[layout](folder, assets, dtype)
    assets.save(folder / "assets", config_folder=folder if layout == "pi0_torch" else None)
    for asset_id, file in checkpoint.norm_stats.items():
        if asset_id != assets.asset_id:
            (folder / "assets" / asset_id).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / "assets" / asset_id / file.name)
