"""What a checkpoint carries besides its weights: model config, norm stats, tokenizer reference, robot, version.

`config.json` lies beside the weights (in `assets/` in a JAX checkpoint, and in layouts whose own config has that
name), norm stats in `assets/<asset_id>/norm_stats.json`, as in openpi's checkpoints, π0-FAST's action tokenizer in
`assets/fast_tokenizer`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pi0 import __version__
from pi0.config import ConfigError, ModelConfig
from pi0.fetch import fetch
from pi0.robots.normalize import NormStats, load_norm_stats, save_norm_stats
from pi0.tokenizers.fast import FASTTokenizer

FORMAT = "pi0"
FAST_FOLDER = "assets/fast_tokenizer"


class AssetsError(ValueError):
    """A checkpoint's `config.json` cannot be used; the message names the file and the field."""


@dataclasses.dataclass(frozen=True)
class Assets:
    """A model's config, and what turns a robot's data into its inputs.

    `norm_stats` holds "state" and "actions" of `asset_id`; `normalization` is the mode they are applied in;
    `tokenizer` is `TextTokenizer.reference()`; `action_tokenizer`, π0-FAST's, is `FASTTokenizer.reference()`, whose
    files `save` copies; `subtasks` says whether π0.5 writes a subtask before its actions,
    `state_in_prompt` whether its prompt tells the state (openpi `discrete_state_input`; its `pi05_libero` sees none);
    `robot` names an adapter of `pi0.robots`, by its name or as {"name": name, **options};
    `step` is the training step, and `training` the config of the experiment.
    """

    model: ModelConfig
    norm_stats: dict[str, NormStats] | None = None
    asset_id: str | None = None
    normalization: str | None = None
    tokenizer: dict[str, Any] | None = None
    robot: str | dict[str, Any] | None = None
    step: int | None = None
    training: dict[str, Any] | None = None
    action_tokenizer: dict[str, Any] | None = None
    subtasks: bool = False
    state_in_prompt: bool = True
    version: str = __version__

    def save(self, folder: Path, config_folder: Path | None = None) -> None:
        """Write a checkpoint's folder `assets`; `config.json` goes into `config_folder` where that is given."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["norm_stats"]
        values = {"format": FORMAT, **fields, "model": self.model.to_dict()}
        if (self.norm_stats is None) != (self.asset_id is None):
            raise AssetsError("norm_stats need an asset_id, the name of their folder below assets/, and it needs them")
        if self.action_tokenizer is not None:
            FASTTokenizer.from_reference(self.action_tokenizer).save(folder / "fast_tokenizer", overwrite=True)
            values["action_tokenizer"] = self.action_tokenizer | {"source": FAST_FOLDER}
        if self.norm_stats is not None and self.asset_id is not None:
            path = folder / self.asset_id / "norm_stats.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_norm_stats(path, self.norm_stats)
        config_folder = config_folder or folder
        config_folder.mkdir(parents=True, exist_ok=True)
        (config_folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Assets | None:
        """The assets in a checkpoint's folder; None without a config of ours, AssetsError for a bad one."""
        for path in (folder / "config.json", folder / "assets" / "config.json"):
            values = read_json(path)
            if values is not None and values.pop("format", None) == FORMAT:
                break
        else:
            return None
        unknown = sorted(values.keys() - {f.name for f in dataclasses.fields(cls)})
        if unknown or "model" not in values:
            problem = f"unknown fields {unknown}" if unknown else "no field 'model'"
            raise AssetsError(f"{path} has {problem}; it was written by version {values.get('version')}")
        try:
            values["model"] = ModelConfig.from_dict(values["model"])
        except ConfigError as error:
            raise AssetsError(f"{path}: {error}") from error
        if values.get("asset_id") is not None:
            values["norm_stats"] = load_norm_stats(folder / "assets" / values["asset_id"] / "norm_stats.json")
        if values.get("action_tokenizer") is not None:
            values["action_tokenizer"] |= {"source": str(folder / values["action_tokenizer"]["source"])}
        return cls(**values)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file. Raises AssetsError for anything else in it."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise AssetsError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise AssetsError(f"{path} holds {type(values).__name__}; expected an object")
    return values


def fetch_norm_stats(checkpoint: str | Path, asset_id: str) -> dict[str, NormStats]:
    """The norm stats that a base checkpoint has under `asset_id`, to fine-tune a robot that it knows.

    `checkpoint` is any address of `pi0.fetch`; nothing but the stats is downloaded: fetch_norm_stats(
    "gs://openpi-assets/checkpoints/pi0_base", "trossen"). Raises what `fetch` and `load_norm_stats` do.
    """
    return load_norm_stats(fetch(f"{str(checkpoint).rstrip('/')}/assets/{asset_id}/norm_stats.json"))
