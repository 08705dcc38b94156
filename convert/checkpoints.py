"""Checkpoints of any layout: detected, opened and validated, written.

Weights are read lazily, and nothing is written before all tensor names and shapes have been validated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.checksums import is_sidecar, verify_sidecars
from convert.detection import detect, infer_config
from convert.formats.npz import read_npz
from convert.formats.orbax import read_orbax, write_orbax
from convert.formats.safetensors import read_safetensors, read_sharded, write_safetensors
from convert.fresh import source_config, with_fresh
from convert.layouts.layout import Layout
from convert.layouts.registry import LAYOUTS, WRITABLE, find_layout
from convert.lerobot import BUFFERS, inert_settings
from convert.peft import ADAPTER, base_of, merge_adapter
from convert.sidecars import failed_parity, norm_stats_files, read_assets, read_model, unsaid_fields
from convert.tensors import CheckpointError, Tensor, pieces, same_bytes
from pi0.assets import NORM_STATS, Assets, check_asset_id, is_complete, read_optional
from pi0.config import ModelConfig
from pi0.families import FAMILIES
from pi0.fetch import fetch, fetched
from pi0.parameters import LayoutError
from pi0.presets import FIELDS, get_preset
from pi0.reading import naming
from pi0.storage import SCHEMES, as_path, below, is_bucket, is_folder, requests

logger = logging.getLogger(__name__)

PRETRAINED = "pretrained_model"  # the folder of a checkpoint of LeRobot's training
WEIGHTS_FILE = "model.safetensors"
TRAIN_STATE = "train_state"  # the folder of what training resumes from, in a checkpoint of a run
STATE_FILE = f"{TRAIN_STATE}/state.safetensors"  # of a run in PyTorch


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened and validated checkpoint.

    Attributes:
        folder: where it was found.
        layout: the layout it is stored in.
        assets: model config, norm stats of one asset id, tokenizer and robot references.
        ours: the parameters, by the names of `pi0.parameters`, read lazily.
        norm_stats: the norm stats files of all asset ids.
        fresh: the names of newly initialized parameters.
        notes: what was read otherwise than stored.
    """

    folder: Path
    layout: Layout
    assets: Assets
    ours: dict[str, Tensor]
    norm_stats: dict[str, Path] = dataclasses.field(default_factory=dict)
    fresh: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def in_layout(self, layout: str | Layout) -> dict[str, Tensor]:
        """The tensors of another layout, read lazily."""
        return find_layout(layout).from_ours(self.assets.model, self.ours)


@dataclasses.dataclass(frozen=True)
class Stored:
    """The tensors stored in the file or folder `weights` of a checkpoint, by their names there.

    `sidecars` is the folder of its sidecar files, `notes` say what of it is computed. `buffers` are tensors beside its
    parameters: norm stats, in policies of LeRobot 0.3.
    """

    folder: Path
    weights: Path
    sidecars: Path
    tensors: dict[str, Tensor]
    buffers: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_tensors(
    source: str | Path,
    *,
    step: int | None = None,
    ema: bool = True,
    dtype: np.dtype | None = None,
    in_place: bool = False,
) -> Stored:
    """The stored tensors of a checkpoint in any format; see `open_checkpoint`.

    Raises CheckpointError, and ConnectionError for one in a bucket that cannot be read.
    """
    in_bucket = str(source).partition("://")[0] in SCHEMES
    with requests(f"cannot read {source}") if in_bucket else contextlib.nullcontext():
        return _read_tensors(source, step, ema, dtype, in_place)


def _read_tensors(source: str | Path, step: int | None, ema: bool, dtype: np.dtype | None, in_place: bool) -> Stored:
    path, weights = find_checkpoint(source, step, ema, in_place)
    if path.suffix == ".npz":
        return Stored(path, path, path, read_npz(path))
    folder = path
    if not ema:
        return Stored(folder, weights / "train_state", folder, _trained(weights))
    for name, read in ((WEIGHTS_FILE, read_safetensors), ("model.safetensors.index.json", read_sharded)):
        if (file := weights / name).exists():
            try:
                below(weights, name)
            except ValueError as error:
                raise CheckpointError(str(error)) from error
            tensors = read(file)
            buffers = {name: tensors.pop(name) for name in list(tensors) if BUFFERS.fullmatch(name)}
            return Stored(folder, file, folder, tensors, buffers)
    if (folder / ADAPTER).exists():
        base = read_tensors(base_of(folder))
        tensors, note = merge_adapter(folder, base.tensors)
        sidecars = folder if (folder / "config.json").exists() else base.sidecars
        return dataclasses.replace(base, folder=folder, sidecars=sidecars, tensors=tensors, notes=(*base.notes, note))
    for params, sidecars in ((weights / "params", folder), (weights, folder.parent)):
        if (params / "_METADATA").exists():
            return Stored(folder, params, sidecars, read_orbax(params, dtype))
    raise CheckpointError(f"{folder} contains neither model.safetensors (or its index) nor an Orbax params folder")


def find_checkpoint(
    source: str | Path, step: int | None = None, ema: bool = True, in_place: bool = False
) -> tuple[Path, Path]:
    """The folder or file of this machine with a checkpoint's sidecar files, and that with its weights.

    Of a checkpoint in a bucket, what is read of it is fetched: a step of a run again where it changed. With `in_place`
    the weights stay there, but for the formats of which that is not possible: adapters and npz files.
    """
    if str(source).partition("://")[0] not in SCHEMES:
        folder = fetch(source)
        folder = folder if folder.suffix == ".npz" else _step_folder(folder, step)
        return folder, folder
    if not in_place and step is None and (there := fetched(source)) is not None:
        folder = there if there.suffix == ".npz" else _step_folder(there, step)
        return folder, folder
    root = as_path(str(source))
    if root.suffix == ".npz":
        folder = fetch(source)
        return folder, folder
    remote = _step_folder(root, step)
    if not in_place or (remote / ADAPTER).exists():
        own_state = "train_state/"
        folder = fetch(str(remote), wanted=lambda n: not (ema and n.startswith(own_state)), refresh=remote != root)
        return folder, folder
    if (remote / "_METADATA").exists():  # the folder of weights itself
        beside = fetch(str(remote.parent), wanted=lambda n: n.startswith("assets/") or "/" not in n, refresh=True)
        return beside / remote.name, remote
    return fetch(str(remote), wanted=is_sidecar, refresh=True), remote


def open_checkpoint(
    source: str | Path,
    config: ModelConfig | None = None,
    *,
    layout: str | Layout | None = None,
    step: int | None = None,
    ema: bool = True,
    asset_id: str | None = None,
    fresh: int | None = None,
    dtype: np.dtype | None = None,
    preset: str | None = None,
    head_dims: tuple[int, int] | None = None,
    in_place: bool = False,
) -> Checkpoint:
    """Open a checkpoint of any layout and validate its tensors' names and shapes; weights are not read yet.

    Args:
        source: a local path, `gs://` or `hf://` address of a folder with an Orbax `params` folder, that folder itself,
            a folder with `model.safetensors` or shards of it, an `.npz` file, the folder of a training run, ours or
            LeRobot's (`checkpoints/<step>`) or openpi's (`<step>`), or of a PEFT adapter, which is merged into its
            base.
        config: the model config. Default: that of our, openpi's or LeRobot's `config.json`; without one, sizes follow
            from shapes, and the rest (horizon, text length, cameras) is that of the released models, which is noted in
            `Assets.assumed`.
        layout: the layout of the source, by name or as "module:NAME". Default: detected from the tensors' names.
        step: the step of a training run (default: the newest).
        ema: whether to read the moving average of a training run's parameters, or the trained parameters.
        asset_id: selects one of several norm stats.
        fresh: the seed with which parts that `config` has and the source lacks as a whole are initialized: an action
            expert (for PaliGemma's weights) or LoRA. Without it, such parts are missing tensors.
        dtype: the dtype to read parameters in, each value rounded once. Default: as stored.
        preset: the name of the openpi config it was trained with (`pi0.presets`), which says what no file does.
        head_dims: the head dims of the language model and the vision tower, where neither a config nor shapes say them.
        in_place: whether weights in a bucket are read there, each part when it is read, instead of fetched into the
            cache of this machine.

    Warns of a checkpoint that failed its comparison with the other framework (`parity.json`). Raises CheckpointError or
    LayoutError that names the file or the tensors.
    """
    stored = read_tensors(source, step=step, ema=ema, dtype=dtype, in_place=in_place)
    with naming(stored.folder):
        return _validated(stored, config, layout, asset_id, fresh, dtype, preset, head_dims)


def _validated(
    stored: Stored,
    config: ModelConfig | None,
    layout: str | Layout | None,
    asset_id: str | None,
    fresh: int | None,
    dtype: np.dtype | None,
    preset: str | None,
    head_dims: tuple[int, int] | None,
) -> Checkpoint:
    folder, tensors = stored.folder, stored.tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    layouts = LAYOUTS.values() if layout is None else [find_layout(layout)]
    layout, kind, lora = detect(shapes, layouts)
    for name, tensor in tensors.items():
        if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype != ml_dtypes.bfloat16:
            raise LayoutError(f"{folder}: {name} has dtype {tensor.dtype}; expected a floating-point dtype")
    assets, tensors, notes = find_assets(stored, layout, kind, lora, config, asset_id, preset, head_dims)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    norm_stats = norm_stats_files(stored.sidecars)
    new: list[str] = []
    if fresh is None:
        ours = layout.to_ours(assets.model, tensors)
    else:
        (embedding,) = (rule.theirs for rule in layout.rules if rule.ours == "paligemma.embedding")
        rows = next((shape[0] for name, shape in shapes.items() if layout.spell(name) == embedding), 0)
        ours = layout.to_ours(source_config(assets.model, kind, lora, rows), tensors)
        ours, new = with_fresh(assets.model, ours, fresh)
    if dtype is not None:  # a no-op for Orbax
        ours = {name: tensor.cast(dtype) for name, tensor in ours.items()}
    for note in notes:
        logger.info("%s: %s", folder, note)
    if (failure := failed_parity(stored.sidecars)) is not None:
        logger.warning("%s: %s", folder, failure)
    return Checkpoint(folder, layout, assets, ours, norm_stats, new, notes)


def find_assets(
    stored: Stored,
    layout: Layout,
    kind: str,
    lora: tuple[str, ...],
    config: ModelConfig | None = None,
    asset_id: str | None = None,
    preset: str | None = None,
    head_dims: tuple[int, int] | None = None,
) -> tuple[Assets, dict[str, Tensor], list[str]]:
    """The assets of stored weights, from our sidecar files or those of openpi or LeRobot; see `open_checkpoint`.

    Returns the tensors that count too, and notes on those that do not. Raises CheckpointError where a sidecar file is
    not the one that was written (`convert.checksums`).
    """
    verify_sidecars(stored.sidecars)
    named = None if preset is None else get_preset(preset)
    if named is not None and asset_id is None and norm_stats_files(stored.sidecars):
        asset_id = named.asset_id
    tensors, tied_output, notes = _used(layout, kind, stored.tensors)
    notes = [*stored.notes, *notes]
    assets = Assets.load(stored.sidecars)
    if assets is not None:
        model, assumed = assets.model, assets.assumed
    else:
        said = read_model(stored.sidecars, kind)
        assumed = unknown_fields(kind) if said is None else unsaid_fields(stored.sidecars)
        if config is None:
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            model = _sized(layout, kind, lora, shapes, said, head_dims)
        elif said is not None:  # what config= replaces is sizes and inputs, not how the weights are to be used
            model = dataclasses.replace(config, **{name: getattr(said, name) for name in CONVENTIONS})
        else:
            model = config
        model = dataclasses.replace(model, tied_output=model.tied_output and tied_output)
    if config is not None and assets is not None:
        model = dataclasses.replace(config, **{name: getattr(model, name) for name in CONVENTIONS})
    if assets is None or asset_id not in (None, assets.asset_id):
        assets = read_assets(stored.sidecars, model, asset_id, stored.buffers)
        notes += inert_settings(stored.sidecars)
        if assets.step is None:
            step = _openpi_step(stored.sidecars) if stored.folder.name != PRETRAINED else training_step(stored.folder)
            assets = dataclasses.replace(assets, step=step)
    if config is not None:  # says all; a preset changes what it says
        assumed = () if named is None else FIELDS
    assets = dataclasses.replace(assets, model=model, assumed=assumed)
    return (assets if named is None else named.apply(assets, str(preset))), tensors, notes


# Fields of a model config that say how its weights are to be used: those of a checkpoint remain with another config.
CONVENTIONS = ("time_periods", "text_format", "tied_output")


def _used(layout: Layout, kind: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool, list[str]]:
    """The tensors that count where both a text embedding and an output projection are stored.

    Returns whether these are one, and notes.
    """
    spelled = {layout.spell(name, tied_output=False): name for name in tensors}
    names = {rule.ours: spelled.get(rule.theirs) for rule in layout.untied}
    embedding, output = names.get("paligemma.embedding"), names.get("paligemma.output")
    if embedding is None or output is None:
        return tensors, True, []
    rest = {name: tensor for name, tensor in tensors.items() if name != output}
    if not FAMILIES[kind].action_tokens:
        return rest, True, [f"{output} is not used: {FAMILIES[kind].title} writes no text in LeRobot"]
    first, second = tensors[embedding], tensors[output]
    if (first.shape, first.dtype) == (second.shape, second.dtype) and all(
        same_bytes(first.read(part), second.read(part)) for part in pieces(first)
    ):
        return rest, True, []
    return tensors, False, [f"the output projection {output} is not the text embedding {embedding}: both are kept"]


def _sized(
    layout: Layout,
    kind: str,
    lora: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]],
    said: ModelConfig | None,
    head_dims: tuple[int, int] | None,
) -> ModelConfig:
    """The model config of a file, `said`, with sizes from shapes; where it is None, all that shapes say."""
    if said is not None and head_dims is None:
        head_dims = said.paligemma.head_dim, said.vision.head_dim
    found = infer_config(layout, kind, shapes, lora, head_dims)
    if said is None:
        return found
    sizes = {name: getattr(found, name) for name in ("vision", "paligemma", "action_expert", "vocab_size")}
    return dataclasses.replace(said, **sizes)


def training_step(folder: Path) -> int | None:
    """The step of a checkpoint of LeRobot's training, `checkpoints/<step>/pretrained_model`; None of others."""
    state = read_optional(folder.parent, "training_state/training_step.json") if folder.name == PRETRAINED else None
    step = (state or {}).get("step")
    return step if type(step) is int else None


def _openpi_step(folder: Path) -> int | None:
    """The step of a folder that Orbax's checkpoint manager wrote, which has it for a name; None of others."""
    return int(folder.name) if folder.name.isdigit() and (folder / "_CHECKPOINT_METADATA").exists() else None


def unknown_fields(kind: str) -> tuple[str, ...]:
    """The fields of a model config that do not follow from the shapes of a checkpoint."""
    return tuple(name for name in FIELDS if name != "action_dim" or not FAMILIES[kind].projections)


def _step_folder(folder: Path, step: int | None) -> Path:
    """The checkpoint folder of a training run; any other folder is returned unchanged."""
    if not is_folder(folder):
        if is_bucket(folder) and not folder.exists():
            raise FileNotFoundError(f"{folder}: the bucket has no such file or folder. Check the spelling.")
        raise CheckpointError(f"{folder} is a file; pass the checkpoint's folder")
    ours = folder / "checkpoints"
    root = ours if ours.is_dir() else folder
    is_step = is_complete if root == ours else _is_step
    found = [f for f in root.glob("*") if re.fullmatch("[0-9]{1,18}", f.name) and is_step(f)]
    steps = {int(f.name): f for f in found}
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has {sorted(steps) or 'none'}")
    chosen = steps[max(steps) if step is None else step] if steps else folder
    theirs = chosen / PRETRAINED  # of LeRobot's training runs, whose steps are named 020000, or last
    return theirs if theirs.is_dir() else chosen


def _is_step(folder: Path) -> bool:
    """Whether a folder is a step of an openpi run, which are named by their step alone."""
    return (folder / "params" / "_METADATA").exists()


def _trained(folder: Path) -> dict[str, Tensor]:
    """The trained parameters of a training state, and the frozen ones, which are only in `params`."""
    if not (folder / TRAIN_STATE).exists():
        raise CheckpointError(
            f"{folder} has no train_state, which only checkpoints of training runs have; read it with ema"
        )
    if (folder / STATE_FILE).exists():
        state, params = read_safetensors(folder / STATE_FILE), read_safetensors(folder / WEIGHTS_FILE)
    else:
        state, params = read_orbax(folder / TRAIN_STATE), read_orbax(folder / "params")
    trained = {name.removeprefix("params/"): tensor for name, tensor in state.items() if name.startswith("params/")}
    if all(name.endswith("/value") for name in trained):  # openpi's; without a moving average it has none
        trained = {name.removesuffix("/value"): tensor for name, tensor in trained.items()}
    unknown = sorted(trained.keys() - params.keys())
    if unknown:
        raise CheckpointError(f"{folder}: train_state has parameters that params has not: {', '.join(unknown[:5])}")
    return params | trained


def write_checkpoint(checkpoint: Checkpoint, folder: Path, layout: str | Layout) -> None:
    """Write a checkpoint into `folder` in another layout, with our sidecar files (`assets/`) and the layout's own.

    Tensors that only the layout's original models have (`Layout.unused`) are written as zeros. Raises LayoutError.
    """
    target = find_layout(layout)
    if not target.writable:
        raise LayoutError(f"the layout {target.name} can only be read; writable layouts are {', '.join(WRITABLE)}")
    if target.check_target is not None:
        target.check_target(checkpoint.assets)
    tensors = checkpoint.in_layout(target)
    assets, dtype = checkpoint.assets, checkpoint.ours["paligemma.embedding"].dtype
    if target.format == "safetensors":
        tensors |= target.unused_tensors(assets.model, dtype)
        write_safetensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    else:
        write_orbax(folder / "params", tensors, target.root)
    if target.write_sidecars is not None:
        target.write_sidecars(folder, assets, dtype)
    assets.save(folder / "assets", config_folder=folder / target.config_folder)
    for asset_id, file in checkpoint.norm_stats.items():
        if asset_id != assets.asset_id:
            copy = below(folder / "assets", check_asset_id(asset_id)) / NORM_STATS
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
