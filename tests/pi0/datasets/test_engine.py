"""Tasks on several processes and on Ray: the results of one process, also where workers die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0.datasets.arrayrecord_writer import build_records
from pi0.datasets.cache import build_cache
from pi0.datasets.check import find_damage
from pi0.datasets.engine import run_tasks
from pi0.datasets.images import Encoding
from pi0.datasets.lerobot import LeRobotDataset
from pi0.datasets.statistics import dataset_statistics
from pi0.robots.registry import make_robot
from pi0.storage import list_files

HERE = Path(__file__).parents[2] / "datasets"
SIZE = (16, 16)


def slow_square(folder: str, number: int) -> int:
    """A square; the first try of number 3 kills its process."""
    mark = Path(folder, "died")
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


def say_and_wait(_: Any, number: int) -> None:
    print(number, flush=True)
    time.sleep(600)


def fail(_: Any, number: int) -> None:
    raise ValueError(f"task {number}")


def same_stats(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in one:
        for field in ("mean", "m2", "min", "max", "counts"):
            np.testing.assert_array_equal(getattr(one[key], field), getattr(other[key], field))


def open_it(**options: Any) -> LeRobotDataset:
    return LeRobotDataset("bundled://metaworld_v30", action_horizon=5, **options)


def test_a_dead_worker_is_survived(tmp_path: Path):
    assert list(run_tasks(slow_square, str(tmp_path), range(8), workers=2)) == [n**2 for n in range(8)]
    with pytest.raises(ValueError, match=r"task [01]"):
        list(run_tasks(fail, None, range(2), workers=2))
    with pytest.raises(ValueError, match="unknown engine 'spark'"):
        list(run_tasks(fail, None, range(2), engine="spark"))


def test_workers_end_with_a_parent_that_is_killed():
    """Its output ends once all processes that inherited it have ended."""
    script = "from tests.pi0.datasets.test_engine import run_tasks, say_and_wait\n"
    script += "if __name__ == '__main__': list(run_tasks(say_and_wait, None, range(2), workers=2))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and sorted(parent.stdout.readline() for _ in range(2)) == ["0\n", "1\n"]
    parent.kill()
    parent.communicate(timeout=60)


def test_statistics_of_two_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pi0.datasets.statistics.BLOCK", 2000)  # many blocks
    robot, dataset = make_robot("metaworld"), open_it(cameras=[])
    same_stats(dataset_statistics(dataset, robot), dataset_statistics(dataset, robot, workers=2))


def test_damage_by_two_processes():
    options = {"states": ("observation.state",)}
    one, two = (find_damage(HERE / "metaworld_v21", workers=n, **options) for n in (1, 2))
    assert one and [str(p) for p in one] == [str(p) for p in two]


@pytest.mark.slow
def test_two_nodes_of_which_one_dies(tmp_path: Path):
    """Cache, statistics and check on Ray are those of one process, to the bit, though a node is lost in the middle."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = str(Path(__file__).parents[3])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        dataset, robot = open_it(image_size=SIZE), make_robot("metaworld")
        expected = build_cache(dataset, tmp_path / "one")
        columns: dict[str, Any] = {"states": ("observation.state", "action"), "actions": ()}
        records = LeRobotDataset("bundled://metaworld_v30", image_size=SIZE, **columns), "", Encoding("png")
        alone = build_records(*records[:2], tmp_path / "records", records[2])
        begun = time.monotonic()
        threading.Timer(4.0, lambda: cluster.remove_node(node, allow_graceful=False)).start()
        found = build_cache(dataset, tmp_path / "two", workers=2, engine="ray")
        together = build_records(*records[:2], tmp_path / "records-two", records[2], workers=2, engine="ray")
        stats: Any = None
        while stats is None or time.monotonic() - begun < 6:
            stats = dataset_statistics(dataset, robot, workers=2, engine="ray")
            damage = find_damage(HERE / "metaworld_v21", workers=2, engine="ray")
        assert len([n for n in ray.nodes() if n["Alive"]]) == 1
        for a, b in zip(expected, found, strict=True):
            assert (a / "frames.npy").read_bytes() == (b / "frames.npy").read_bytes()
        for name, file in list_files(alone).items():
            assert (together / name).read_bytes() == file.path.read_bytes()
        same_stats(dataset_statistics(dataset, robot), stats)
        assert [str(p) for p in damage] == [str(p) for p in find_damage(HERE / "metaworld_v21")]
    finally:
        ray.shutdown()
        cluster.shutdown()
