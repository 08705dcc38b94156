"""Orbax checkpoints of a training run: parameters for inference, the training state, and the assets beside them.

checkpoints/<step>/params        what is evaluated and exported: the moving average where there is one
checkpoints/<step>/train_state   what training goes on from, but for what is frozen, which `params` has
checkpoints/<step>/assets        config.json, norm stats
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pi0.assets import Assets


class AssetsHandler(ocp.CheckpointHandler):
    """Writes a checkpoint's `Assets` into its `assets` folder."""

    def save(self, directory: Any, args: AssetsSave) -> None:
        if jax.process_index() == 0:
            args.assets.save(Path(directory))

    def restore(self, directory: Any, args: AssetsRestore | None = None) -> Assets | None:
        return Assets.load(Path(directory).parent)


@ocp.args.register_with_handler(AssetsHandler, for_save=True)
@dataclasses.dataclass
class AssetsSave(ocp.args.CheckpointArgs):
    """The assets to save."""

    assets: Assets


@ocp.args.register_with_handler(AssetsHandler, for_restore=True)
@dataclasses.dataclass
class AssetsRestore(ocp.args.CheckpointArgs):
    """Nothing to say: the assets are restored as they were saved."""


class Checkpoints:
    """The checkpoints of one run, written asynchronously, of which the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            folder.resolve(), item_names=("params", "train_state", "assets"), options=options
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, params: Any, train_state: Any, assets: Assets) -> None:
        """Start writing a checkpoint; it gets its name when it is complete."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(params),
                train_state=ocp.args.PyTreeSave({k: v for k, v in train_state.items() if k != "frozen"}),
                assets=AssetsSave(dataclasses.replace(assets, step=step)),
            ),
        )

    def restore(self, step: int, train_state: Any) -> Any:
        """The training state at `step`, with the structure and shardings of `train_state`."""

        def wanted(tree: Any) -> ocp.args.PyTreeRestore:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
            restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
            return ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)

        frozen = train_state["frozen"]
        items = {"train_state": wanted({k: v for k, v in train_state.items() if k != "frozen"})}
        if frozen:
            items["params"] = wanted(frozen)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {**restored["train_state"], "frozen": restored["params"] if frozen else {}}

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
