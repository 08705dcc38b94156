from __future__ import annotations

import logging
import math
import threading

import jax.numpy as jnp
import pytest

from pi0.assets import Assets
from pi0.storage import as_path
from pi0.variants import get_variant
from pi0_jax.training.checkpoints import CHECKSUMS, Checkpoints, damage
from tests.bucket import Bucket

ASSETS = Assets(get_variant("tiny"))


def saved(folder, steps: dict[int, float], **options) -> list[int]:
    """The steps that stay of a run with these validation losses."""
    checkpoints, metrics = Checkpoints(folder, **options), {}
    for step, loss in steps.items():
        metrics["validation_loss"] = loss  # as training does, in one table
        params = {"a": {"kernel": jnp.full(3, step)}}
        state = {"params": params, "frozen": {}, "ema": None}
        checkpoints.save(step, params, state, ASSETS, metrics if loss else None)
    checkpoints.close()
    return sorted(int(f.name) for f in folder.iterdir() if f.name.isdigit())


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep": 1}, [6]),
        ({"keep": 2}, [5, 6]),
        ({"keep": 1, "keep_best": True}, [2, 6]),
        ({"keep": 1, "keep_every": (3, 0)}, [3, 6]),
    ],
)
def test_what_is_kept(options, kept, tmp_path):
    assert saved(tmp_path, {1: 5.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0, 6: 5.0}, **options) == kept


def test_the_best_stays_when_a_run_goes_on(tmp_path):
    assert saved(tmp_path, {1: 5.0, 2: 1.0, 3: 2.0}, keep=1, keep_best=True) == [2, 3]
    assert saved(tmp_path, {4: 3.0, 5: 0, 6: 4.0}, keep=1, keep_best=True) == [2, 6]


def test_the_best_without_validation(tmp_path, caplog):
    assert saved(tmp_path, {1: 0, 2: 0, 3: 0}, keep=1, keep_best=True) == [3]
    assert saved(tmp_path, {4: 2.0, 5: math.nan, 6: 0}, keep=1, keep_best=True) == [4, 6]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_checksums_of_every_file(tmp_path):
    saved(tmp_path, {1: 0}, keep=1)
    assert (tmp_path / "1" / CHECKSUMS).exists() and damage(tmp_path / "1") is None
    extra = tmp_path / "1" / "assets" / "config.json"
    content = extra.read_text()
    extra.write_text(content + " ")
    assert damage(tmp_path / "1") == "assets/config.json is not what was written"
    extra.unlink()
    assert damage(tmp_path / "1") == "assets/config.json is missing"
    extra.write_text(content)
    (tmp_path / "1" / CHECKSUMS).write_text("{")
    assert damage(tmp_path / "1") == "checksums.json is not JSON"


def test_a_step_that_is_there_stays(tmp_path):
    assert saved(tmp_path, {1: 0, 2: 0}, keep=2) == [1, 2]
    assert saved(tmp_path, {2: 0, 3: 0}, keep=2) == [2, 3]


def test_nothing_is_written_any_more_after_a_part_has_failed(bucket: Bucket):
    """Otherwise a process that ends then would never end."""

    def decide(method: str, path: str) -> str | None:
        if method == "GET":
            return None
        return "403" if "/_CHECKPOINT_METADATA" in path else "slow" if "train_state" in path else None

    with bucket.fault(decide), pytest.raises(OSError, match="a checkpoint cannot be written; there is no other one"):
        saved(as_path(f"{bucket.address}/checkpoints"), {1: 0}, keep=1)
    running = {thread.name for thread in threading.enumerate()}
    assert not running & {"async_save", "write_metadata_after_commits", "array_type_handler", "serialize_shardings"}
