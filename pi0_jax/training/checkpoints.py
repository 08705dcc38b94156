"""Orbax checkpoints of a training run.

checkpoints/<step>/params         what is evaluated and exported: the moving average where there is one, frozen ones
checkpoints/<step>/train_state    what training resumes from, without frozen parameters, which `params` has
checkpoints/<step>/assets         config.json, norm stats
checkpoints/<step>/checksums.json of every file, written when the checkpoint is complete
checkpoints/<step>/parity.json    the comparison with its export to PyTorch, once it is made (`exports`)
checkpoints/damaged-<step>        a checkpoint that was found damaged and moved there

In a bucket, Orbax writes a checkpoint in its place and, when it is complete, a file that says so; one that is moved
loses that file first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from convert.checksums import WEIGHTS, find_changes, read_checksums, sign
from convert.formats.orbax import read_orbax
from pi0.assets import CHECKSUMS, Assets, is_complete
from pi0.storage import as_path, requests, resolved, upload
from pi0.training.checkpoints import BEST, put_aside, writing

logger = logging.getLogger(__name__)


class AssetsHandler(ocp.CheckpointHandler):
    """Writes a checkpoint's `Assets` into its `assets` folder."""

    def save(self, directory: Any, args: AssetsSave) -> None:
        """Write the assets; of several processes, the first does."""
        if jax.process_index() == 0:
            with tempfile.TemporaryDirectory(prefix="pi0-") as folder:
                args.assets.save(Path(folder))
                upload(Path(folder), as_path(str(directory)))

    def restore(self, directory: Any, args: AssetsRestore | None = None) -> Assets | None:
        """The assets of the checkpoint, None without any."""
        return Assets.load(as_path(str(directory)).parent)


@ocp.args.register_with_handler(AssetsHandler, for_save=True)
@dataclasses.dataclass
class AssetsSave(ocp.args.CheckpointArgs):
    """The assets to save."""

    assets: Assets


@ocp.args.register_with_handler(AssetsHandler, for_restore=True)
@dataclasses.dataclass
class AssetsRestore(ocp.args.CheckpointArgs):
    """No options: the assets are restored as they were saved."""


class Checkpoints:
    """The checkpoints of one run, written asynchronously.

    The newest `keep` stay, with `keep_best` also the one of the lowest validation loss, with `keep_every` also those of
    every so many steps, for each number of them. All processes of a run make one and call the same methods.
    """

    def __init__(self, folder: Path, keep: int, keep_best: bool = False, keep_every: Sequence[int] = ()):
        self._folder = resolved(folder)
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if keep_best:
            best = checkpoint_managers.BestN(
                get_metric_fn=_validation_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        policies += [checkpoint_managers.EveryNSteps(steps) for steps in keep_every if steps]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=_validation_loss if keep_best else None,  # with it, metrics are kept for a restart
            best_mode="min",
            create=True,
            # Otherwise a folder that cannot be made is noticed by a timeout, minutes later.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(
            self._folder, item_names=("params", "train_state", "assets"), options=options
        )
        self._signing: dict[int, threading.Thread] = {}

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(
        self, step: int, params: Any, train_state: Any, assets: Assets, metrics: dict[str, float] | None = None
    ) -> None:
        """Start writing a checkpoint, which gets its name when it is complete; do nothing for a step that exists.

        `metrics` may contain the validation loss, by which the best is kept. Raises OSError where this checkpoint, or
        the one before, cannot be written.
        """
        if step in self._manager.all_steps():
            return
        with writing(self._folder, lambda: self.latest_step, ValueError):  # of Orbax
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(params),
                    train_state=ocp.args.PyTreeSave({k: v for k, v in train_state.items() if k != "frozen"}),
                    assets=AssetsSave(dataclasses.replace(assets, step=step)),
                ),
                # A copy: Orbax keeps it, and the caller goes on to change it. It warns of None.
                metrics=dict(metrics) if metrics and math.isfinite(metrics.get(BEST, math.nan)) else {},
            )
        if jax.process_index() == 0:
            self._signing = {step: thread for step, thread in self._signing.items() if thread.is_alive()}
            self._signing[step] = threading.Thread(target=self._sign_when_complete, args=(step,), daemon=True)
            self._signing[step].start()

    def wait_until_signed(self, step: int) -> None:
        """Wait until a checkpoint that this process saves is complete and signed; not for others."""
        if (thread := self._signing.get(step)) is not None:
            thread.join()

    def _sign_when_complete(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()  # raises in each thread that waits
            if is_complete(self._folder / str(step)):
                sign(self._folder / str(step))
        except Exception as error:
            logger.warning("checkpoint %d has no %s: %s", step, CHECKSUMS, error)

    def restore_newest(self, train_state: Any) -> tuple[int, Any]:
        """The newest intact checkpoint's step and training state, with the shardings of `train_state` (abstract).

        Damaged ones are reported and renamed, and the one before is restored; (0, None) without any.
        """
        while (step := self.latest_step) is not None:
            folder = self._folder / str(step)
            with requests(f"cannot read {folder}"):
                problem = damage(folder) if jax.process_index() == 0 else None
            damaged = bool(multihost_utils.broadcast_one_to_all(np.array(problem is not None)))
            if not damaged:
                with requests(f"cannot read {folder}"):
                    state = self.restore(step, train_state)
                if bool(_all_finite(state)):
                    if jax.process_index() == 0 and not (folder / CHECKSUMS).exists():
                        print(f"checkpoint {step} has no {CHECKSUMS}: all of its arrays were read; it is signed again")
                        sign(folder)
                    return step, state
                problem = "it has NaN or infinite values; the run had diverged"
            if jax.process_index() == 0:
                put_aside(self._folder, step, str(problem))
            multihost_utils.sync_global_devices(f"damaged checkpoint {step}")
            self._manager.reload()
        return 0, None

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
        """Wait until everything is written and signed. Raises OSError where the newest one cannot be written."""
        with writing(self._folder, lambda: self.latest_step, ValueError):  # of Orbax
            try:
                self._manager.wait_until_finished()
                for thread in self._signing.values():
                    thread.join()
                self._manager.close()
            except Exception:
                # Where a part of it has failed, the manager does not wait for the others: a process that ends while
                # they are written to a bucket would wait forever for threads that cannot go on.
                with contextlib.suppress(Exception):
                    self._manager._checkpointer.wait_until_finished()
                raise


def _validation_loss(metrics: dict[str, float]) -> float:
    """That of a checkpoint; infinite without a validation at its step."""
    return metrics.get(BEST, math.inf)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def damage(step: Path) -> str | None:
    """What is wrong with a checkpoint, or None: by its checksums or, without them, by reading all of it.

    Raises ConnectionError where it is in a bucket that cannot be read.
    """
    try:
        expected = read_checksums(step)
    except ValueError as error:
        return str(error).removeprefix(f"{step}/").partition(": ")[0]
    if expected is not None:
        return next(iter(find_changes(step, expected)), None)
    try:
        with requests(f"cannot read {step}"):
            Assets.load(step)
            for item in WEIGHTS:
                for tensor in read_orbax(step / item).values():
                    tensor.read(())
    except ConnectionError:  # which says nothing about the checkpoint
        raise
    except (ValueError, OSError) as error:
        return str(error)
    return None
