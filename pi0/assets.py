"""The assets of a checkpoint besides its weights: model config, norm stats, tokenizer reference, robot, version.

`config.json` is next to the weights (in `assets/` in a JAX checkpoint, and in layouts whose own config has that name),
norm stats are in `assets/<asset_id>/norm_stats.json`, as in openpi's checkpoints, π0-FAST's action tokenizer in
`assets/fast_tokenizer`, and a text tokenizer that is a file of this machine in `assets/tokenizer.model`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from pi0 import __version__
from pi0.config import ModelConfig, from_dict
from pi0.fetch import fetch
from pi0.reading import read_json
from pi0.robots.normalize import NormStats, load_norm_stats, save_norm_stats
from pi0.storage import below, is_bucket, requests, write_text
from pi0.tokenizers.fast import FASTTokenizer
from pi0.tokenizers.text import TextTokenizer

FORMAT = "pi0"
FAST_FOLDER = "assets/fast_tokenizer"
TEXT_FILE = "assets/tokenizer.model"
NORM_STATS = "norm_stats.json"
CHECKSUMS = "checksums.json"  # of all files of a checkpoint, written when it is complete
COMMITTED = "commit_success.txt"  # which Orbax writes into a complete checkpoint in a bucket
RESERVED = ("config.json", "fast_tokenizer", "tokenizer.model")  # names in assets/ that no asset id may have


class AssetsError(ValueError):
    """A checkpoint's assets cannot be used; the message names the file and the field."""


@dataclasses.dataclass(frozen=True)
class Assets:
    """A model's config, and the config of the pipeline between a robot and the model.

    Attributes:
        norm_stats: of "state" and "actions"; their folder is `asset_id`, and `normalization` the mode they are used in,
            or {"state": mode, "actions": mode, "eps": LeRobot's epsilon}.
        tokenizer: `TextTokenizer.reference()`; `save` copies a local file.
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
    normalization: str | dict[str, Any] | None = None
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
        """Write a checkpoint's folder `assets`; `config.json` is written to `config_folder` if given.

        Raises AssetsError for norm stats without an asset id, or the reverse.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["norm_stats"]
        values = {"format": FORMAT, **fields, "model": self.model.to_dict()}
        if (self.norm_stats is None) != (self.asset_id is None):
            raise AssetsError("norm_stats and asset_id, the name of their folder below assets/, need each other")
        stats_file = None if self.asset_id is None else below(folder, check_asset_id(self.asset_id)) / NORM_STATS
        if self.action_tokenizer is not None and self.action_tokenizer.get("sha256") is not None:
            fast = FASTTokenizer.from_reference(self.action_tokenizer)
            fast.save(folder / "fast_tokenizer", overwrite=True)
            values["action_tokenizer"] = self.action_tokenizer | {"source": FAST_FOLDER}
        text = (self.tokenizer or {}).get("source")
        if self.tokenizer is not None and text is not None and "://" not in text:
            copy, _ = folder / "tokenizer.model", TextTokenizer.from_reference(self.tokenizer)
            if Path(text).resolve() != copy.resolve():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(text, copy)
            values["tokenizer"] = self.tokenizer | {"source": TEXT_FILE}
        if self.norm_stats is not None and stats_file is not None:
            save_norm_stats(stats_file, self.norm_stats)
        write_text((config_folder or folder) / "config.json", json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Assets | None:
        """The assets in a checkpoint's folder, or None without a config of this package. Raises AssetsError."""
        for name in ("config.json", "assets/config.json"):
            path = folder / name
            values = read_optional(folder, name)
            if values is not None and values.pop("format", None) == FORMAT:
                break
        else:
            return None
        unknown = sorted(values.keys() - {f.name for f in dataclasses.fields(cls)} | values.keys() & {"norm_stats"})
        if unknown or "model" not in values:
            problem = f"unknown fields {unknown}" if unknown else "no field 'model'"
            raise AssetsError(f"{path} has {problem}; it was written by version {values.get('version')}")
        try:
            values["model"] = ModelConfig.from_dict(values["model"])
            assets = from_dict(cls, values)
            no_fields = set(assets.assumed) - {f.name for f in dataclasses.fields(ModelConfig)}
            if no_fields:
                raise ValueError(f"assumed has {sorted(no_fields)}, which are no fields of the model")
            changes: dict[str, Any] = {
                field: _resolved(folder, getattr(assets, field), field) for field in ("tokenizer", "action_tokenizer")
            }
            if assets.asset_id is not None:
                stats = f"assets/{check_asset_id(assets.asset_id)}/{NORM_STATS}"
                changes["norm_stats"] = load_norm_stats(below(folder, stats))
        except AssetsError:
            raise
        except ValueError as error:
            raise AssetsError(f"{path}: {error}") from error
        return dataclasses.replace(assets, **changes)


def _resolved(folder: Path, reference: dict[str, Any] | None, field: str) -> dict[str, Any] | None:
    """A tokenizer's reference with the path of the file that its source names below the checkpoint's folder."""
    source = None if reference is None else reference.get("source")
    if reference is None or source is None or (isinstance(source, str) and "://" in source):
        return reference
    try:
        return reference | {"source": str(below(folder, source))}
    except ValueError as error:
        raise ValueError(
            f"{field}.source: {error}. A checkpoint's tokenizer is an address, or in its folder: copy the file there"
        ) from error


def is_complete(step: Path) -> bool:
    """Whether a folder of a run's `checkpoints` is a complete one.

    On a disk each gets its name when it is complete. In a bucket Orbax writes a file when it is; one that was copied
    there has our checksums.
    """
    if is_bucket(step):
        with requests(f"cannot read {step}"):
            return any((step / name).exists() for name in (COMMITTED, CHECKSUMS))
    return step.is_dir()


def check_asset_id(asset_id: str) -> str:
    """The asset id, the name of a folder in `assets/`. Raises AssetsError where it is none."""
    try:
        first = below(Path(), asset_id).parts[0]
    except ValueError as error:
        raise AssetsError(f"asset_id: {error}") from error
    if first in RESERVED:
        raise AssetsError(f"asset_id is {asset_id!r}; {first} in assets/ is something else: choose another name")
    return asset_id


def read_optional(folder: Path, name: str) -> dict[str, Any] | None:
    """The object in a JSON file of a checkpoint's folder, or None without the file. Raises AssetsError."""
    try:
        path = below(folder, name)
        return read_json(path, error=AssetsError)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (AssetsError, ConnectionError):
        raise
    except (ValueError, OSError) as error:
        raise AssetsError(str(error)) from error


def fetch_norm_stats(source: str | Path, asset_id: str) -> dict[str, NormStats]:
    """The norm stats of `asset_id` that a base checkpoint has, or that `pi0-stats --out SOURCE` wrote.

    `source` is any address of `pi0.fetch`; only the stats are downloaded: fetch_norm_stats(
    "gs://openpi-assets/checkpoints/pi0_base", "trossen"). Raises as `fetch` and `load_norm_stats` do, and
    FileNotFoundError that names both places.
    """
    address, stats = str(source).rstrip("/"), f"{check_asset_id(asset_id)}/{NORM_STATS}"
    places = [f"{address}/assets/{stats}", f"{address}/{stats}"]
    for place in places:
        with contextlib.suppress(FileNotFoundError):
            return load_norm_stats(fetch(place))
    raise FileNotFoundError(f"there are no norm stats of {asset_id!r}: neither {places[0]} nor {places[1]}")
