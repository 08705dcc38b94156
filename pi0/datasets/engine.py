"""Independent tasks of preparing data: in this process, in processes of this machine, or on a Ray cluster.

Results come in the order of the tasks, whoever computed them, so that what is made of them is the same to the bit.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from pi0.datasets.base import Dataset
from pi0.plugins import require_extra

RETRIES = 3  # of a task whose process died
ENGINES = ("local", "ray")

_shared: Any = None  # in a worker process


def require_all_episodes(dataset: Dataset) -> None:
    """Raise ValueError for a dataset with only some or none of its undamaged episodes."""
    damaged = {problem.episode for problem in dataset.skipped}
    if {episode.index for episode in dataset.every_episode} - damaged != {e.index for e in dataset.episodes}:
        raise ValueError("a cache needs a dataset with all of its episodes")
    if not dataset.episodes:
        raise ValueError(f"all episodes of {dataset.root} are damaged")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """The arguments `--workers` and `--engine`."""
    parser.add_argument("--workers", type=_count, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="local (default): processes of this machine; ray: tasks on the Ray cluster of $RAY_ADDRESS, or of this "
        "machine, with at most --workers at a time. Results are the same",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: at least 1 is needed")
    return int(text)


def run_tasks(
    function: Callable[[Any, Any], Any],
    shared: Any,
    tasks: Sequence[Any],
    *,
    workers: int = 1,
    engine: str = "local",
    progress: tqdm | None = None,
    amount: Callable[[Any], int] = lambda _: 1,
) -> Iterator[Any]:
    """The results of `function(shared, task)` in the order of the tasks; `amount` of a task is added to `progress`.

    A task whose process or machine dies is done again, up to RETRIES times; what a task raises is raised here. Raises
    ValueError for an unknown engine, MissingExtraError without Ray, and RuntimeError where tasks die each time.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known are {', '.join(ENGINES)}")
    if engine == "ray":
        results = _on_ray(function, shared, tasks, workers)
    elif workers == 1 or len(tasks) < 2:
        results = ((i, function(shared, task)) for i, task in enumerate(tasks))
    else:
        results = _in_processes(function, shared, tasks, min(workers, len(tasks)))
    done: dict[int, Any] = {}
    following = 0
    for number, result in results:
        done[number] = result
        if progress is not None:
            progress.update(amount(tasks[number]))
        while following in done:
            yield done.pop(following)
            following += 1


def _start(shared: Any) -> None:
    global _shared
    _shared = shared
    end_with_parent()


def end_with_parent() -> None:
    """End this worker process when the one that started it does, also if that was killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()  # type: ignore[union-attr]
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def _call(function: Callable[[Any, Any], Any], task: Any) -> Any:
    return function(_shared, task)


def _in_processes(
    function: Callable[[Any, Any], Any], shared: Any, tasks: Sequence[Any], workers: int
) -> Iterator[tuple[int, Any]]:
    left, deaths = set(range(len(tasks))), 0
    while left:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, context, _start, (shared,)) as pool:
            jobs = {pool.submit(_call, function, tasks[i]): i for i in sorted(left)}
            try:
                for job in concurrent.futures.as_completed(jobs):
                    result = job.result()
                    left.remove(jobs[job])
                    yield jobs[job], result
            except BrokenProcessPool as error:
                if (deaths := deaths + 1) > RETRIES:
                    raise RuntimeError(f"worker processes died {deaths} times; is memory too small?") from error
            finally:
                pool.shutdown(cancel_futures=True)


def _on_ray(
    function: Callable[[Any, Any], Any], shared: Any, tasks: Sequence[Any], workers: int
) -> Iterator[tuple[int, Any]]:
    require_extra("ray", "ray")
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    remote = ray.remote(max_retries=RETRIES)(function)
    reference, waiting = ray.put(shared), list(range(len(tasks)))[::-1]
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running[remote.remote(reference, tasks[waiting[-1]])] = waiting[-1]
                waiting.pop()
            (ready, *_), _ = ray.wait(list(running))
            try:
                yield running[ready], ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            del running[ready]
    finally:
        for job in running:
            ray.cancel(job, force=True)
