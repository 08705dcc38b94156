"""Read and write the sidecar files of openpi's checkpoints, and choose between them and LeRobot's (`convert.lerobot`).

openpi: `assets/<asset_id>/norm_stats.json`, and in PyTorch checkpoints a `config.json` of five fields.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert.lerobot import ASSET_ID, GEMMAS, read_lerobot_assets, read_lerobot_model
from convert.lerobot_export import variants_of
from convert.tensors import Tensor
from pi0.assets import NORM_STATS, Assets, AssetsError, read_optional
from pi0.config import ConfigError, ModelConfig
from pi0.families import FAMILIES
from pi0.numerics import TIME_PERIODS
from pi0.parameters import LayoutError
from pi0.robots.normalize import load_norm_stats
from pi0.storage import require_below
from pi0.variants import get_variant

PARITY = "parity.json"  # the report of `pi0-parity --json` on a checkpoint and its export, in both


def failed_parity(folder: Path) -> str | None:
    """What a checkpoint's `parity.json` says where its comparison failed; None where it passed or there is none.

    Raises AssetsError for a file that is no JSON object.
    """
    values = read_optional(folder, PARITY)
    if values is None or values.get("passed") is True:
        return None
    stage = f"the first stage that is out is {values.get('first_failure')!r:.80}"
    return f"it FAILED its comparison with the other framework ({PARITY}): {stage}"


def read_model(folder: Path, kind: str) -> ModelConfig | None:
    """The model config in openpi's or LeRobot's `config.json`; None where there is none.

    Raises LayoutError for a config of another model family than that of the weights, `kind`, or with unknown values.
    """
    path, values = folder / "config.json", read_optional(folder, "config.json")
    if values is None or not {"paligemma_variant", "type"} & values.keys():
        return None
    if "type" in values:
        return read_lerobot_model(folder, kind)
    try:
        model = dataclasses.replace(get_variant(kind), paligemma=GEMMAS[values["paligemma_variant"]])
        if model.action_expert is not None:
            model = dataclasses.replace(model, action_expert=GEMMAS[values["action_expert_variant"]])
        return dataclasses.replace(model, action_dim=values["action_dim"], action_horizon=values["action_horizon"])
    except KeyError as error:
        raise LayoutError(f"{path} cannot be used: missing or unknown {error}") from error
    except (ConfigError, TypeError, AttributeError) as error:
        raise LayoutError(f"{path} cannot be used: {error}") from error


def unsaid_fields(folder: Path) -> tuple[str, ...]:
    """The fields of a model config that the `config.json` read by `read_model` does not have: openpi's, two."""
    values = read_optional(folder, "config.json") or {}
    return () if "paligemma_variant" not in values or "type" in values else ("max_token_len", "image_keys")


def norm_stats_files(folder: Path) -> dict[str, Path]:
    """All norm stats files of a checkpoint, by asset id, which may contain slashes. Raises AssetsError for links."""
    root = folder / "assets"
    found = {path.parent.relative_to(root).as_posix(): path for path in sorted(root.rglob(NORM_STATS))}
    for path in found.values():
        try:
            require_below(folder, path)
        except ValueError as error:
            raise AssetsError(str(error)) from error
    return {asset_id: path for asset_id, path in found.items() if asset_id != "."}


def read_assets(
    folder: Path, model: ModelConfig, asset_id: str | None = None, buffers: Mapping[str, Tensor] | None = None
) -> Assets:
    """The assets of an openpi or LeRobot checkpoint, with the norm stats of `asset_id` (default: the only ones).

    `buffers` are norm stats among the weights. Raises LayoutError for an unknown `asset_id`, or a setting of LeRobot's
    that is not supported.
    """
    files = norm_stats_files(folder)
    if asset_id is None and len(files) == 1:
        (asset_id,) = files
    if asset_id is not None and asset_id in files:
        return Assets(model, load_norm_stats(files[asset_id]), asset_id, model.family.normalization)
    if asset_id in (None, ASSET_ID):
        try:
            found = read_lerobot_assets(folder, model, buffers)
        except (LayoutError, AssetsError):
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise LayoutError(f"{folder}: its processors cannot be used: {error!r}") from error
        if found is not None:
            return found
    if asset_id is not None:
        raise LayoutError(f"{folder} has no norm stats {asset_id!r}; it has {', '.join(files) or 'none'}")
    return Assets(model)


def check_openpi(assets: Assets) -> list[str]:
    """Notes on what openpi does otherwise with a model. Raises LayoutError for one that it cannot run."""
    model, notes = assets.model, []
    if "state_proj" in FAMILIES[model.kind].projections and model.state_dim is not None:
        raise LayoutError(
            f"openpi has one size for state and actions; this model has {model.state_size} and {model.action_dim}: it "
            "cannot hold it"
        )
    if model.time_periods != TIME_PERIODS:
        raise LayoutError(
            f"openpi embeds the flow time with the periods {list(TIME_PERIODS)}, this model with "
            f"{list(model.time_periods)}: openpi would run another model"
        )
    if model.text_format != "openpi":
        notes.append("openpi lower-cases π0-FAST's prompt, writes no <bos> after it and skips a position, unlike here")
    own = model.family.normalization
    if assets.normalization not in (None, "zscore", "quantile"):
        notes.append(f"openpi's own normalization is {own}; this checkpoint's is {assets.normalization}")
    return notes


def check_openpi_torch(assets: Assets) -> list[str]:
    """`check_openpi`, and whether openpi's `config.json` can say the sizes."""
    unnamed = variants_of(assets.model) is None
    return check_openpi(assets) + ["openpi has no name for these sizes: its config.json is not written"] * unnamed


def write_openpi(folder: Path, assets: Assets, dtype: np.dtype) -> None:
    """Write `config.json` like openpi's converter to PyTorch, for a model whose sizes have a name there."""
    variants = variants_of(assets.model)
    if variants is not None:
        model = assets.model
        sizes = {"action_dim": model.action_dim, "action_horizon": model.action_horizon}
        values = {**sizes, **variants, "precision": dtype.name}
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
