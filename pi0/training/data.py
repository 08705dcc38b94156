"""The data of a run: datasets, norm stats and assets of its config, and batches on the devices, by Grain.

Grain loads neither framework.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from pi0.assets import Assets, fetch_norm_stats
from pi0.config import ModelConfig
from pi0.datasets.annotations import AnnotatedDataset, Questions
from pi0.datasets.batches import Batches, InOrder
from pi0.datasets.engine import end_with_parent
from pi0.datasets.filters import FilteredDataset
from pi0.datasets.mixture import Mixture, split_episodes
from pi0.datasets.registry import episode_numbers, open_dataset
from pi0.datasets.statistics import RunningStats, dataset_statistics
from pi0.observation import Observation, check_actions
from pi0.robots.normalize import NormStats
from pi0.robots.pipeline import Pipeline
from pi0.robots.registry import make_robot
from pi0.robots.robot import Robot
from pi0.run_config import DataConfig, RunConfig
from pi0.tokenizers.fast import FASTTokenizer
from pi0.tokenizers.text import TextTokenizer
from pi0.training.draws import Batch, Drawn, Draws

AHEAD = 2  # prefetched batches: in each worker process, and on the devices
SHARED = 2**16  # bytes from which on an array is passed on by a worker process in shared memory
FETCHED = 4  # batches that each worker process fetches from a bucket at a time


def shared(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array of any shape that a worker process passes on without copying it."""
    large = math.prod(shape) * np.dtype(dtype).itemsize >= SHARED
    return SharedMemoryArray(shape, dtype) if large else np.empty(shape, dtype)


class Loader(Iterator[Batch]):
    """An endless iterator of the batches from step `start` on, on the devices.

    `workers` processes (0: a thread of this one) prefetch them; a batch depends on its step alone. This host reads
    `rows` of each batch, and `place` makes global arrays of them. `waited` counts the seconds that `next` has waited,
    `read` the examples, and `truncated` those whose text did not fit into `max_token_len`. Leaving this context manager
    ends the processes.
    """

    def __init__(
        self,
        batches: Batches,
        model: ModelConfig,
        rows: np.ndarray,
        place: Callable[[Batch], Batch],
        *,
        start: int = 0,
        workers: int = 0,
    ):
        if not flags.FLAGS.is_parsed():  # Grain has settings among absl's flags; without a command line: the defaults
            flags.FLAGS.mark_as_parsed()

        self.waited, self.read, self.truncated = 0.0, 0, 0

        def finish(data: dict[str, np.ndarray]) -> Batch:
            actions = check_actions(data.pop("actions"), model, len(rows))
            self.read, self.truncated = self.read + len(rows), self.truncated + int(data.pop("truncated").sum())
            drawn = Drawn(*(data.pop(name, None) for name in Drawn._fields))
            return place((Observation.from_dict(data, model), actions, drawn))

        def begin_worker(*_: int) -> None:
            end_with_parent()
            # The training process handles signals: it saves, then stops.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

        # Processes decode in parallel, each in one thread: more would wait for the lock of Python. What they decode
        # is fetched ahead by threads, which wait for a bucket.
        steps = grain.MapDataset.range(start, sys.maxsize).map(functools.partial(batches.fetch, rows=rows))
        decode = functools.partial(batches.decode, rows=rows, count=True, empty=shared if workers else np.empty)
        read = steps.to_iter_dataset(grain.ReadOptions(FETCHED, FETCHED)).map(decode)
        read = grain.experimental.WithOptionsIterDataset(read, grain.experimental.DatasetOptions(min_shm_size=SHARED))
        # Grain spawns: forking a process that runs threads, as JAX and PyTorch do, may deadlock.
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
        placed = read.mp_prefetch(processes, begin_worker).map(finish)
        self._batches: Any = iter(grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=AHEAD))
        self._steps_of_a_pass = len(batches)

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        # A process that starts inherits what is blocked: an interrupt would end it before it can ignore that.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        self._batches.start_prefetch()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        batch = next(self._batches)
        self.waited += time.perf_counter() - begin
        return batch

    def one_pass(self) -> Iterator[Batch]:
        """As many batches as contain every frame once."""
        return itertools.islice(self, self._steps_of_a_pass)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._batches.close()
        self._batches = iter(())  # Grain's iterators complain when they outlive their modules
        gc.collect()  # copied arrays are held until then, and a process that ends would leave shared memory behind


@dataclasses.dataclass(frozen=True)
class Recordings:
    """One dataset of a run: its config, its robot, and its frames of training and of validation episodes."""

    config: DataConfig
    robot: Robot
    training: Any
    validation: Any

    @classmethod
    def open(cls, config: DataConfig, model: ModelConfig, seed: int) -> Recordings:
        """Raises ValueError for a config that does not fit the dataset, and DataError for a damaged one."""
        robot = make_robot(config.robot)
        if config.questions:
            camera = next(key for key in model.image_keys if key in robot.cameras.values())
            return cls(config, robot, Questions(config.questions, camera), None)
        if not config.root:
            raise ValueError("data.root names no dataset; give a folder or an address: --config.data.root=data/libero")
        root = config.root
        options: dict[str, Any] = {
            "format": config.format,
            "action_horizon": model.action_horizon,
            "image_size": model.image_resolution,
            "cache": config.cache or None,
            "skip_damaged": config.skip_damaged,
        }
        parts = split_episodes(episode_numbers(root, config.format), config.validation_episodes, seed)
        training, validation = (open_dataset(root, robot, episodes=p, **options) if p else None for p in parts)
        assert training is not None  # split_episodes leaves some
        skipped = training.skipped + (validation.skipped if validation else [])
        if skipped:
            episodes = len({problem.episode for problem in skipped})
            print(f"{root}: {episodes} damaged episodes are left out; the first problem is {skipped[0]}")
        longest = int(np.diff(training.starts).max(initial=0))
        if longest < model.action_horizon:
            raise ValueError(
                f"{root}: the longest of {len(training.episodes)} training episodes has {longest} frames, and "
                f"model.action_horizon is {model.action_horizon}: no chunk of actions would be whole"
            )
        held_out: Any = validation if validation and len(validation) else None
        if config.filters:
            if config.subtasks:
                raise ValueError(f"{root}: data.filters and data.subtasks cannot be combined; give one of them")
            held_out = FilteredDataset(held_out, **config.filters) if held_out else None
            return cls(config, robot, FilteredDataset(training, **config.filters), held_out)
        if file := config.subtasks:
            held_out = AnnotatedDataset(held_out, file) if held_out else None
            return cls(config, robot, AnnotatedDataset(training, file), held_out)
        return cls(config, robot, training, held_out)

    @property
    def has_subtasks(self) -> bool:
        """Whether its frames have subtasks."""
        return "subtask" in self.training[0]


def load_data(config: RunConfig) -> tuple[Assets, Batches, Batches | None]:
    """The assets of a run's checkpoints, its training batches, and those of held-out episodes where there are any.

    The assets are those of the first of `config.data.sources`. Datasets of one `asset_id` have the norm stats that
    `norm_stats_from` has under it, or else those of all their training episodes. Raises ValueError for data that cannot
    be trained on, DataError for damaged recordings.
    """
    recordings = [Recordings.open(source, config.model, config.seed) for source in config.data.sources]
    norm_stats = find_norm_stats(recordings)
    subtasks = config.recipe is not None and any(r.has_subtasks for r in recordings)
    assets = [make_assets(r.config, norm_stats[r.config.asset_id], config, subtasks) for r in recordings]
    pipelines = [Pipeline.from_assets(a) for a in assets]
    weights = [r.config.weight for r in recordings if r.config.weight is not None] or None
    training = Mixture([r.training for r in recordings], weights, config.seed, config.shuffle)
    if config.batch_size > len(training):
        raise ValueError(f"batch_size is {config.batch_size}; with {len(training)} frames it must be 1 to that many")
    draws, augment = Draws(config.model, config.seed, config.rtc), config.seed if config.data.augment else None
    batches = Batches(training, pipelines, config.batch_size, augment, draws)
    for dataset, pipeline in zip(training.datasets, pipelines, strict=True):  # raise for an unfit one now
        first = {key: value[None] for key, value in pipeline(dataset[0]).items() if key != "actions"}
        Observation.from_dict(first, config.model)
    held_out = [(r.validation, p) for r, p in zip(recordings, pipelines, strict=True) if r.validation]
    if not held_out:
        return assets[0], batches, None
    datasets, own = zip(*held_out, strict=True)
    passes = Batches(InOrder(datasets, config.batch_size), own, config.batch_size)
    every_pass = Draws(config.model, seed=0, period=len(passes) * config.batch_size)  # the same, and no delays
    return assets[0], batches, dataclasses.replace(passes, draw=every_pass)


def find_norm_stats(recordings: Sequence[Recordings]) -> dict[str, dict[str, NormStats]]:
    """The norm stats of each asset id. Raises ValueError where its datasets do not agree on where they come from."""
    places: dict[str, str] = {}
    totals: dict[str, dict[str, RunningStats]] = {}
    for one in recordings:
        asset_id, place = one.config.asset_id, one.config.norm_stats_from
        if places.setdefault(asset_id, place) != place:
            raise ValueError(
                f"data.mixture has norm stats of {asset_id!r} from {places[asset_id] or 'its episodes'} and from "
                f"{place or 'its episodes'}; give one of them another asset_id"
            )
        if not place and not isinstance(one.training, Questions):
            total = totals.setdefault(asset_id, {})
            recorded = one.training
            while isinstance(recorded, AnnotatedDataset | FilteredDataset):
                recorded = recorded.dataset
            for key, stats in dataset_statistics(recorded, one.robot).items():
                total[key] = total[key] + stats if key in total else stats
    computed = {asset_id: {key: s.norm_stats() for key, s in total.items()} for asset_id, total in totals.items()}
    return computed | {asset_id: fetch_norm_stats(place, asset_id) for asset_id, place in places.items() if place}


def make_assets(data: DataConfig, norm_stats: dict[str, NormStats], run: RunConfig, subtasks: bool = False) -> Assets:
    """The assets of one dataset of a run."""
    fast = data.action_tokenizer
    return Assets(
        run.model,
        norm_stats=norm_stats,
        asset_id=data.asset_id,
        normalization=data.normalization,
        tokenizer=TextTokenizer(data.tokenizer).reference(),
        robot=data.robot if isinstance(data.robot, str) else dict(data.robot),
        action_tokenizer=FASTTokenizer(fast).reference() if fast else None,
        subtasks=subtasks,
        state_in_prompt=data.state_in_prompt,
        training=run.to_dict(),
    )
