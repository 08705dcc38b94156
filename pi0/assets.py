"""The assets of a checkpoint besides its weights: model config, norm stats, tokenizer reference, robot, version.

`config.json` is next to the weights (in `assets/` in a JAX checkpoint, and in layouts whose own config has that name),
norm stats are in `assets/<asset_id>/norm_stats.json`, as in openpi's checkpoints, and π0-FAST's action tokenizer in
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
from pi0.storage import below, write_text
from pi0.tokenizers.fast import FASTTokenizer

FORMAT = "pi0"
FAST_FOLDER = "assets/fast_tokenizer"


class AssetsError(ValueError):
    """A checkpoint's assets cannot be used; the message names the file and the field."""


@dataclasses.dataclass(frozen=True)
class Assets:
    """A model's config, and the config of the pipeline between a robot and the model.

    Attributes:
        norm_stats: of "state" and "actions"; their folder is `asset_id`, and `normalization` the mode they are used in.
        tokenizer: `TextTokenizer.reference()`.
        action_tokenizer: `FASTTokenizer.reference()` of π0-FAST; `save` copies its files.
        subtasks: whether π0.5 generates a subtask before its actions.
        state_in_prompt: whether π0.5's prompt has the state (openpi `discrete_state_input`; false in `pi05_libero`).
        robot: a name for `make_robot`, or {"name": name, **options}.
        step: the training step.
        training: the config of the experiment.
        assumed: the fields of `model` that no file of the checkpoint says; they are those of released models.
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
    assumed: tuple[str, ...] = ()
    version: str = __version__

    def save(self, folder: Path, config_folder: Path | None = None) -> None:
        """Write a checkpoint's folder `assets`; `config.json` is written to `config_folder` if given."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["norm_stats"]
        values = {"format": FORMAT, **fields, "model": self.model.to_dict()}
        if (self.norm_stats is None) != (self.asset_id is None):
            raise AssetsError("norm_stats and asset_id, the name of their folder below assets/, need each other")
        if self.action_tokenizer is not None:
            FASTTokenizer.from_reference(self.action_tokenizer).save(folder / "fast_tokenizer", overwrite=True)
            values["action_tokenizer"] = self.action_tokenizer | {"source": FAST_FOLDER}
        if self.norm_stats is not None and self.asset_id is not None:
            save_norm_stats(below(folder, self.asset_id) / "norm_stats.json", self.norm_stats)
        write_text((config_folder or folder) / "config.json", json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Assets | None:
        """The assets in a checkpoint's folder, or None without a config of this package. Raises AssetsError."""
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
        values["assumed"] = tuple(values.get("assumed", ()))
        if values.get("asset_id") is not None:
            values["norm_stats"] = load_norm_stats(below(folder / "assets", values["asset_id"]) / "norm_stats.json")
        if values.get("action_tokenizer") is not None:
            values["action_tokenizer"] |= {"source": str(folder / values["action_tokenizer"]["source"])}
        return cls(**values)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None without the file. Raises AssetsError for anything else in it."""
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
    """The norm stats of a base checkpoint's `asset_id`, to fine-tune it on a robot of its training data.

    `checkpoint` is any address of `pi0.fetch`; only the stats are downloaded: fetch_norm_stats(
    "gs://openpi-assets/checkpoints/pi0_base", "trossen"). Raises as `fetch` and `load_norm_stats` do.
    """
    return load_norm_stats(fetch(f"{str(checkpoint).rstrip('/')}/assets/{asset_id}/norm_stats.json"))
