"""RLDS as tensorflow-datasets 4.9.10 wrote and read it (`tests/datasets/rlds`)."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pi0.datasets.cache import build_cache
from pi0.datasets.check import find_damage
from pi0.datasets.errors import DataError
from pi0.datasets.filters import FilteredDataset
from pi0.datasets.records import Example, _masked_crc
from pi0.datasets.registry import open_dataset
from pi0.datasets.rlds import RLDSDataset
from pi0.robots.registry import make_robot

FOLDER = Path(__file__).parents[2] / "datasets" / "rlds"
EXPECTED = np.load(FOLDER / "expected.npz")
FORMS = ["rlds_tfrecord", "rlds_array_record"]
NAMES = {
    "action": "action",
    "joint_position": "observation/joint_position",
    "gripper_position": "observation/gripper_position",
    "joint_velocity": "action_dict/joint_velocity",
}
SHARD = "droid_like/1.0.0/droid_like-train.tfrecord-00000-of-00001"


def open_rlds(root: Path, **options: object) -> RLDSDataset:
    return RLDSDataset(root, **{"states": list(NAMES.values())[1:], "actions": ["action"]} | options)  # type: ignore


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER / "rlds_tfrecord", tmp_path / "rlds"))


@pytest.mark.parametrize("form", FORMS)
def test_as_tensorflow_datasets_reads_it(form: str):
    """Numbers are equal to the bit in float32; images to 1 of 255, and here to the bit: both are of
    libjpeg-turbo with its fast DCT, whose rounding another processor may do otherwise."""
    dataset = open_rlds(FOLDER / form)
    assert dataset.fps == 15 and len(dataset.episodes) == 3 and len(dataset) == 120
    for key in EXPECTED.files:
        number, *rest = key.split("/")
        rows = slice(*dataset.starts[int(number) : int(number) + 2])
        if len(rest) == 2:
            image = dataset.image(f"observation/{rest[1]}", int(number), int(rest[0]))
            assert np.abs(image.astype(int) - EXPECTED[key]).max() <= 1
        elif rest[0] in NAMES:
            np.testing.assert_array_equal(dataset.table(NAMES[rest[0]])[rows], EXPECTED[key].astype(np.float32))
        elif rest[0] == "language_instruction":
            assert dataset.task(rows.start) == EXPECTED[key].item().decode()
        else:
            assert dataset.table("success")[rows].all() == (b"/success/" in EXPECTED[key].item())
    assert len(set(dataset[0]["tasks"])) > 1 and "" not in dataset[0]["tasks"], "an empty one is none"
    assert dataset[0]["task"] == dataset[0]["tasks"][0]


def test_both_forms_are_equal():
    one, other = (open_dataset(FOLDER / form, make_robot("droid"), format="rlds", action_horizon=5) for form in FORMS)
    for i in (0, 39, 40, 119):
        a, b = one[i], pickle.loads(pickle.dumps(other))[i]
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_without_tensorflow():
    script = f"""import sys
from pi0.datasets.rlds import RLDSDataset
for form in {FORMS}:
    RLDSDataset({str(FOLDER)!r} + "/" + form, states=(), actions=["action"])[3]
assert not {{"tensorflow", "tensorflow_datasets"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_filters():
    dataset = open_rlds(FOLDER / "rlds_tfrecord")
    success = FilteredDataset(dataset, success_only=True)
    assert len(success) == 80 and success[0]["episode_index"] == 1
    drawer = FilteredDataset(dataset, instruction="DRAWER")
    assert len(drawer) == 40 and {drawer[i]["episode_index"] for i in range(40)} == {2}
    actions = dataset._columns["action"]
    actions[50:70] = actions[50]
    moving = FilteredDataset(dataset, idle=0.0, idle_frames=4)
    left_out = set(range(120)) - {
        moving[i]["episode_index"] * 40 + moving[i]["frame_index"] for i in range(len(moving))
    }
    assert set(range(50, 66)) <= left_out and not left_out & set(range(41, 50)), "the last goes on to the next change"
    with pytest.raises(ValueError, match="leave none"):
        FilteredDataset(dataset, instruction="no such words")


def test_a_cache_of_it(tmp_path: Path):
    options = {"image_size": (24, 24), "states": (), "actions": ()}
    plain = open_rlds(FOLDER / "rlds_array_record", **options)
    build_cache(plain, tmp_path, workers=2)
    cached = open_rlds(FOLDER / "rlds_array_record", cache=tmp_path, **options)
    camera = cached.cameras[0]
    assert camera in cached._cached
    np.testing.assert_array_equal(cached[77][camera], plain[77][camera])


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (3, b"\xff", "length of record 0 does not match its checksum"),
        (500, b"\xff\xfe\xfd\xfc", "record 0 does not match its checksum"),
        (None, b"", "truncated|are left"),
    ],
)
def test_damage(place: int | None, value: bytes, problem: str, root: Path):
    content = bytearray((root / SHARD).read_bytes())
    if place is None:
        del content[-9:]
    else:
        content[place : place + len(value)] = value
    (root / SHARD).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        open_rlds(root)
    (found,) = find_damage(root, format="rlds", states=(), actions=("action",))
    assert str(found.file) == str(root / SHARD)


def test_a_length_beyond_the_file(root: Path):
    """With a right checksum too: nothing of that size is allocated."""
    length = struct.pack("<Q", 2**40)
    (root / SHARD).write_bytes(length + struct.pack("<I", _masked_crc(length)) + bytes(100))
    with pytest.raises(DataError, match="1099511627776 bytes"):
        open_rlds(root)


def test_missing_shards(root: Path):
    (root / SHARD).rename(root / SHARD.replace("of-00001", "of-00003"))
    with pytest.raises(DataError, match=r"lacks shards \[1, 2\] of 3"):
        open_rlds(root)


@pytest.mark.parametrize("change", [{"steps": None}, {}, {"steps": {"sequence": {"feature": []}}}])
def test_other_features(change: dict, root: Path):
    file = root / "droid_like/1.0.0/features.json"
    file.write_text(json.dumps({"featuresDict": {"features": change}}))
    with pytest.raises(DataError, match="has no steps of an episode"):
        open_rlds(root)


def test_examples_of_any_bytes():
    """Damaged or made up, an example is decoded or refused."""
    rng, refused = np.random.default_rng(0), 0
    whole = b"\x0a\x15\x0a\x13\x0a\x01a\x12\x0e\x12\x0c\x0a\x0a" + b"\x00\x00\x80\x3f" * 2 + b"\x00\x00"
    for _ in range(2000):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(256)
        try:
            example = Example(bytes(damaged))
            for name in example._features:
                example.numbers(name)
        except DataError:
            refused += 1
    assert 0 < refused <= 2000
