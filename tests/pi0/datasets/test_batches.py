from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from pi0.assets import Assets
from pi0.datasets.batches import Batches, InOrder
from pi0.datasets.lerobot import LeRobotDataset
from pi0.datasets.mixture import Mixture
from pi0.datasets.registry import open_dataset
from pi0.datasets.statistics import dataset_statistics
from pi0.robots.pipeline import Pipeline
from pi0.robots.registry import make_robot
from pi0.robots.transforms import TokenizePrompt, Transforms
from pi0.sample import METAWORLD
from pi0.tokenizers.text import TextTokenizer
from pi0.variants import get_variant

MODEL = get_variant("tiny", max_token_len=16)
ONE_CAMERA = {"name": "metaworld", "cameras": {"wrist": "left_wrist_0_rgb"}}


def open_parts(episodes: list[int], robot: str | dict = "metaworld") -> tuple[LeRobotDataset, Pipeline]:
    """Some bundled episodes at the model's size, and their pipeline."""
    adapter, size = make_robot(robot), MODEL.image_resolution
    options = {"action_horizon": MODEL.action_horizon, "image_size": size, "cache": "memory"}
    dataset = open_dataset(METAWORLD, adapter, episodes=episodes, **options)
    stats = {key: s.norm_stats() for key, s in dataset_statistics(dataset, adapter).items()}
    tokenizer = TextTokenizer("bundled://tokenizer.model").reference()
    assets = Assets(MODEL, norm_stats=stats, asset_id="x", normalization="zscore", tokenizer=tokenizer, robot=robot)
    return dataset, Pipeline.from_assets(assets)


@pytest.fixture(scope="module")
def batches() -> Batches:
    dataset, pipeline = open_parts([0, 4])
    return Batches(Mixture([dataset], seed=7), [pipeline], 8, augment_seed=7)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_a_batch_depends_on_its_step_alone(batches: Batches):
    """Read out of order and by a pickled copy, which is what workers have."""
    copy = pickle.loads(pickle.dumps(batches))
    for step in (5, 0, len(batches) + 2):
        assert same(copy.read(step), batches.read(step))
    assert not same(batches.read(0), batches.read(1))


def test_hosts_have_their_rows_of_the_batch(batches: Batches):
    whole, rows = batches.read(3), np.arange(8)
    parts = [batches.read(3, half) for half in np.split(rows, 2)]
    assert same(whole, {key: np.concatenate([part[key] for part in parts]) for key in whole})


def test_every_frame_comes_once_before_any_comes_again(batches: Batches):
    frames = [batches.order.locate(p) for p in range(len(batches.order))]
    assert len(set(frames)) == len(frames) == len(batches.order.datasets[0])
    assert len(batches) == -(-len(frames) // 8)


def test_augmentation_is_new_for_every_position(batches: Batches):
    """Pictures alone differ from those without, and another time the same frame differs from its first."""
    size = len(batches.order)
    plain = Batches(batches.order, batches.pipelines, 8)
    frame = batches.order.locate(0)
    again = next(p for p in range(size, 2 * size) if batches.order.locate(p) == frame)
    first, later, unvaried = batches.row(0), batches.row(again), plain.row(0)
    for key in first:
        varied = not np.array_equal(first[key], unvaried[key])
        assert varied == (key in ("image/base_0_rgb", "image/left_wrist_0_rgb")), key
        assert varied == (not np.array_equal(first[key], later[key]))
    assert same(unvaried, plain.row(again))
    other = Batches(batches.order, batches.pipelines, 8, augment_seed=8)
    assert not np.array_equal(other.row(0)["image/base_0_rgb"], first["image/base_0_rgb"])


def test_in_order_has_every_frame_in_whole_batches():
    order = InOrder([range(3), range(100, 107)], 4)
    frames = [order.datasets[d][i] for d, i in map(order.locate, range(24))]
    every = [0, 1, 2, *range(100, 107)]
    assert frames == [*every, 0, 1] * 2


def test_robots_with_other_cameras_mix():
    """What one robot of a mixture does not have is black and masked."""
    parts = [open_parts([0]), open_parts([4], ONE_CAMERA)]
    datasets, pipelines = zip(*parts, strict=True)
    assert datasets[1].cameras == ["observation.images.wrist"]  # no picture is decoded that the robot has no use for
    batches = Batches(Mixture(datasets, [1, 1]), pipelines, 8, augment_seed=0)
    where = np.array([batches.order.locate(p)[0] for p in range(8)])
    assert set(where) == {0, 1}
    batch = batches.read(0)
    np.testing.assert_array_equal(batch["image_mask/base_0_rgb"], where == 0)
    assert batch["image_mask/left_wrist_0_rgb"].all()
    np.testing.assert_array_equal(batch["image/base_0_rgb"].any((1, 2, 3)), where == 0)
    alone = Batches(Mixture(datasets[1:]), pipelines[1:], 8).read(0)
    assert "image/base_0_rgb" not in alone and not alone["image_mask/base_0_rgb"].any()


def test_rows_whose_text_is_cut_are_counted(batches: Batches):
    assert "truncated" not in batches.read(0) and not batches.read(0, count=True)["truncated"].any()
    assets = dataclasses.replace(batches.pipelines[0], tokenizer=TextTokenizer("bundled://tokenizer.model"))
    short = dataclasses.replace(
        assets,
        transforms=Transforms(
            [
                dataclasses.replace(step, tokenizer=assets.tokenizer, max_token_len=4)
                if isinstance(step, TokenizePrompt)
                else step
                for step in assets.transforms.steps
            ]
        ),
    )
    cut = Batches(batches.order, [short], 8).read(0, np.arange(3), count=True)
    assert cut["truncated"].tolist() == [True] * 3 and cut["tokenized_prompt"].shape == (3, 4)


class Odd(Batches):
    def row(self, position: int, stored: bytes | None = None) -> dict[str, np.ndarray]:
        return super().row(position, stored) | {"state": np.zeros(1 + position % 2, np.float32)}


def test_rows_that_do_not_go_together_are_refused(batches: Batches):
    """Not broadcast into one another."""
    odd = Odd(batches.order, batches.pipelines, 8)
    with pytest.raises(ValueError, match=r"state is float32 \[1\] in one row of a batch and float32 \[2\] in another"):
        odd.read(0)
