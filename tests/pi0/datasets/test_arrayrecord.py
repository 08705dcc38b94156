"""Datasets of `pi0-cache --to arrayrecord`: what is read is what was recorded, from a folder and from a bucket."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image

import pi0.datasets.arrayrecord
import pi0.datasets.arrayrecord_writer as writer
from pi0.datasets.arrayrecord import ArrayRecordDataset, read_spans
from pi0.datasets.cache import main
from pi0.datasets.errors import DataError
from pi0.datasets.images import Encoding
from pi0.datasets.lerobot import LeRobotDataset
from pi0.datasets.records import Example, array_record_writer, crc32c, encode_example, record_offsets, span_end
from pi0.datasets.records import without_headers as strip
from pi0.datasets.registry import open_dataset
from pi0.datasets.statistics import dataset_statistics
from pi0.robots.registry import make_robot
from pi0.storage import as_path, list_files, upload, version
from tests.bucket import Bucket, times
from tests.pi0.datasets.test_engine import same_stats

ROOT = Path(__file__).parents[2] / "datasets" / "metaworld_v21_images"  # two episodes
SIZE, CAMERA = (24, 32), "observation.images.corner"
COLUMNS: dict[str, Any] = {"states": ("observation.state", "action"), "actions": ()}


def source(**options: Any) -> LeRobotDataset:
    return LeRobotDataset(ROOT, **{"image_size": SIZE} | options)


def build(target: Path, encoding: str = "png", **run: Any) -> Path:
    return writer.build_records(source(**COLUMNS), "recordings", target, Encoding(encoding), **run)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: file.path.read_bytes() for name, file in list_files(folder).items()}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(writer, "SHARD_FRAMES", 60)  # an episode each
    monkeypatch.setenv("PI0_CACHE", str(tmp_path / "pi0-cache"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_FRAMES", 60)
        return build(tmp_path_factory.mktemp("records") / "dataset")


@pytest.fixture
def remote(built: Path, bucket: Bucket) -> Path:
    """The same in a bucket."""
    upload(built, as_path(f"{bucket.address}/dataset"))
    bucket.requests.clear()
    return as_path(f"{bucket.address}/dataset")


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def first_shard(root: Path) -> Path:
    return sorted((root / "shards").iterdir())[0]


@pytest.mark.parametrize("where", ["local", "bucket"])
def test_what_was_recorded(where: str, built: Path, request: pytest.FixtureRequest) -> None:
    root = built if where == "local" else request.getfixturevalue("remote")
    expected = source(action_horizon=5)
    found = pickle.loads(pickle.dumps(ArrayRecordDataset(root, action_horizon=5, image_size=SIZE)))
    assert len(found) == len(expected) and found.fps == expected.fps and found.cameras == expected.cameras
    frames = [0, 7, 58, 59, 60, len(expected) - 1]
    stored = found.fetch(frames)
    for i in frames:
        right = expected[i]
        for item in (found[i], found.item(i, stored[i])):
            assert item.keys() == right.keys()
            for key, value in right.items():
                np.testing.assert_array_equal(item[key], value, err_msg=key)
    robot = make_robot("metaworld")
    same_stats(dataset_statistics(found, robot), dataset_statistics(expected, robot))
    part = ArrayRecordDataset(root, episodes=[1], cameras=[CAMERA])
    np.testing.assert_array_equal(part[0][CAMERA], expected[int(expected.starts[1])][CAMERA])
    assert ArrayRecordDataset.episode_numbers(root) == [0, 1]


def test_others_read_the_files(built: Path) -> None:
    dataset, recorded = ArrayRecordDataset(built), source()
    others = ArrayRecordDataSource([str(file) for file in sorted((built / "shards").iterdir())])
    assert len(others) == len(dataset)
    for i in (0, 59, len(dataset) - 1):
        offset = int(dataset.table("record/offset")[i])
        assert others[i] == strip(dataset.fetch([i])[i], offset)
        example, item = Example(others[i]), recorded[i]
        np.testing.assert_array_equal(example.numbers("observation.state"), item["observation.state"])
        np.testing.assert_array_equal(example.numbers("action"), item["action"][0])
        assert example.numbers("frame_index") == item["frame_index"]
        assert bytes(example.bytes_list("task")[0]).decode() == item["task"]


@pytest.mark.parametrize("sizes", [[0, 1, 65536, 65495, 200_000], [65430, 70_000, 3], [30_000] * 5])
def test_where_records_are(sizes: list[int], tmp_path: Path) -> None:
    file, rng = tmp_path / "some.array_record", np.random.default_rng(0)
    records = [rng.bytes(size) for size in sizes]
    made = array_record_writer(file)
    for record in records:
        made.write(record)
    made.close()
    offsets = record_offsets(file, [(len(record), crc32c(record)) for record in records])
    spans = [(file, offset, span_end(offset, size)) for offset, size in zip(offsets, sizes, strict=True)]
    assert [strip(data, offset) for data, offset in zip(read_spans(spans), offsets, strict=True)] == records
    with pytest.raises(DataError, match="record 0 is not where"):
        record_offsets(file, [(sizes[0], 1)])


def test_examples() -> None:
    numbers = np.array([0, 1, -1, 300, 2**62], np.int64)
    values = np.array([[0.5, -2.0]], np.float64)
    example = Example(encode_example({"n": numbers, "v": values, "image/π": b"\0" * 300, "yes": np.array(True)}))
    np.testing.assert_array_equal(example.numbers("n"), numbers)
    np.testing.assert_array_equal(example.numbers("v"), [0.5, -2])
    assert example.numbers("yes") == [1] and example.bytes_list("image/π") == [b"\0" * 300]


@pytest.mark.parametrize(
    ("encoding", "bound"), [("raw", 0), ("png", 0), ("jpeg:100", 4), ("jpeg:95", 8), ("jpeg:95:420", 20)]
)
def test_encodings(encoding: str, bound: int) -> None:
    """Bounds: at quality 100, YCbCr and DCT are rounded; below, quantized; ":420" averages colors of a smooth image."""
    y, x = np.mgrid[:48, :64]
    image = np.stack([x * 3, y * 5, 255 - x - y], -1).astype(np.uint8)
    stored = Encoding(encoding).encode(image)
    found = Encoding(encoding).decode(stored, (48, 64))
    assert np.abs(found.astype(int) - image).max() <= bound
    with pytest.raises(DataError, match="was expected"):
        Encoding(encoding).decode(stored, (48, 65))
    if encoding != "raw":
        with pytest.raises(DataError, match="max_pixels"):
            Encoding(encoding).decode(stored, None, max_pixels=100)
        with pytest.raises(DataError, match="cannot be decoded"):
            Encoding(encoding).decode(stored[:40], None)


@pytest.mark.parametrize("name", ["jpeg", "jpeg:0", "jpeg:101", "jpeg:95:422", "webp", "raw:1"])
def test_unknown_encodings(name: str) -> None:
    with pytest.raises(ValueError, match="unknown encoding"):
        Encoding(name)


def test_jpeg_is_read_as_pillow_does(tmp_path: Path) -> None:
    root = build(tmp_path / "dataset", "jpeg:95")
    item = ArrayRecordDataset(root)[3]
    example = Example(ArrayRecordDataSource(str(first_shard(root)))[3])
    (tmp_path / "image.jpg").write_bytes(example.bytes_list(CAMERA)[0])
    np.testing.assert_array_equal(item[CAMERA], np.array(Image.open(tmp_path / "image.jpg")))
    assert np.abs(item[CAMERA].astype(int) - source()[3][CAMERA]).mean() < 3


@pytest.mark.parametrize("where", ["local", "bucket"])
def test_an_interrupted_one_goes_on(where: str, built: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bucket = request.getfixturevalue("bucket") if where == "bucket" else None
    target = tmp_path / "target" if bucket is None else as_path(f"{bucket.address}/target")
    with pytest.MonkeyPatch.context() as patch:
        left = iter([*range(70)])  # the second shard is begun
        patch.setattr(writer, "encode_example", lambda features: (next(left), encode_example(features))[1])
        with pytest.raises(RuntimeError):  # of the generator: any error that is none of ours
            build(target)
    assert not (target / "meta").is_dir() and len([*(target / "shards").iterdir()]) == 1
    with pytest.raises(DataError, match="no finished dataset"):
        ArrayRecordDataset(target)
    with pytest.raises(FileExistsError, match="unfinished, and was begun from other"):
        build(target, "raw")
    shard = first_shard(target)
    before = version(shard) if bucket else shard.stat().st_mtime_ns
    if bucket is None:
        (target / "shards" / ".1.partial.records-00001-of-00002.array_record").write_bytes(b"of a killed process")
    build(target)
    assert (version(shard) if bucket else shard.stat().st_mtime_ns) == before, "written a second time"
    assert contents(target) == contents(built)


def test_two_processes_write_the_same(built: Path, tmp_path: Path) -> None:
    assert contents(build(tmp_path / "two", workers=2)) == contents(built)
    written = {name: os.stat(tmp_path / "two" / name).st_mtime_ns for name in contents(built)}
    build(tmp_path / "two")
    assert written == {name: os.stat(tmp_path / "two" / name).st_mtime_ns for name in contents(built)}


def test_where_something_else_is(built: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="made from other recordings"):
        build(copy, "jpeg:95")
    with pytest.raises(FileExistsError, match="made from other recordings"):
        writer.build_records(source(**COLUMNS), "others", copy, Encoding("png"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    with pytest.raises(FileExistsError, match="has other files"):
        build(tmp_path / "folder")
    with pytest.raises(ValueError, match="raw images have no size"):
        writer.build_records(source(image_size=None, **COLUMNS), "", tmp_path / "new", Encoding("raw"))
    with pytest.raises(ValueError, match="all of its episodes"):
        writer.build_records(source(episodes=[0]), "", tmp_path / "new", Encoding("raw"))
    assert not (tmp_path / "new").exists()


def test_a_damaged_image_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    root = Path(shutil.copytree(ROOT, tmp_path / "dataset"))
    file = root / "data/chunk-000/episode_000001.parquet"
    file.write_bytes(file.read_bytes().replace(b"IDAT", b"XDAT"))
    with pytest.raises(DataError, match="episode 1, frame"):
        writer.build_records(LeRobotDataset(root, image_size=SIZE), "", tmp_path / "target", Encoding("png"))
    assert [name for name in contents(tmp_path / "target") if not name.startswith("unfinished/")] == [
        "shards/records-00000-of-00002.array_record"
    ]


def flip(data: bytes) -> bytes:
    return data[:9000] + bytes([data[9000] ^ 1]) + data[9001:]


DAMAGES = [
    pytest.param(flip, "does not match its checksum", id="flipped"),
    pytest.param(lambda data: data[:5000], "the file is truncated", id="truncated"),
    pytest.param(lambda data: b"", "the file is truncated", id="empty"),
    pytest.param(None, "the file is missing", id="missing"),
]


@pytest.mark.parametrize("where", ["local", "bucket"])
@pytest.mark.parametrize(("damage", "problem"), DAMAGES)
def test_damaged_shards(damage: Any, problem: str, where: str, copy: Path, request: pytest.FixtureRequest) -> None:
    shard = first_shard(copy)
    content = shard.read_bytes()
    shard.unlink() if damage is None else shard.write_bytes(damage(content))
    root = copy
    if where == "bucket":
        root = as_path(f"{request.getfixturevalue('bucket').address}/copy")
        upload(copy, root)
    dataset = ArrayRecordDataset(root)
    frames = [i for i in range(59) if int(dataset.table("record/offset")[i]) > 5000]
    with pytest.raises(DataError, match=f"shards/records-00000-of-00002.array_record.*{problem}"):
        for i in frames:
            dataset[i]
    dataset[59]  # of the other shard


def test_another_datasets_shard(copy: Path) -> None:
    shards = sorted((copy / "shards").iterdir())
    shutil.copyfile(shards[1], shards[0])
    with pytest.raises(DataError, match=r"episode 0, frame 0: its record does not match its checksum"):
        ArrayRecordDataset(copy)[0]


def change_info(root: Path, **fields: Any) -> None:
    file = root / "meta" / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"format": "other"}, "is of 'other'"),
        ({"revision": 2}, "revision 2; expected"),
        ({"encoding": "exe"}, "unknown encoding"),
        ({"size": [10**9, 1]}, "is damaged"),
        ({"index": "../index"}, r"without '\.\.'"),
        ({"frames": 10**12}, "were expected"),
        ({"files": {"../x": [1, ""]}}, r"without '\.\.'"),
        ({"features": {"reward": {"dtype": "float32", "shape": [1]}}}, "no columns"),
    ],
)
def test_untrusted_info(fields: dict[str, Any], problem: str, copy: Path) -> None:
    change_info(copy, **fields)
    with pytest.raises(DataError, match=problem):
        ArrayRecordDataset(copy)


def test_untrusted_index(copy: Path) -> None:
    folder = next(copy.glob("index-*"))
    about = json.loads((folder / "about.json").read_text())
    sizes = folder / f"column-{about['columns'].index('record/size')}.npy"
    array = np.load(sizes)
    np.save(sizes, np.full_like(array, 2**40))
    with pytest.raises(DataError, match=r"its record would have 1099511627776 bytes"):
        ArrayRecordDataset(copy)[0]
    np.save(sizes, array[:-1])
    with pytest.raises(DataError, match="bytes; expected"):
        ArrayRecordDataset(copy)
    np.save(sizes, array)
    (folder / "lengths.npy").unlink()
    with pytest.raises(DataError, match="index is damaged"):
        ArrayRecordDataset(copy)


def test_an_index_that_changed_in_the_bucket(copy: Path, bucket: Bucket, tmp_path: Path) -> None:
    file = next(copy.glob("index-*/column-0.npy"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    root = as_path(f"{bucket.address}/copy")
    upload(copy, root)
    for _ in range(2):  # nothing of it is kept
        with pytest.raises(DataError, match="does not match its checksum"):
            ArrayRecordDataset(root)


def test_requests(remote: Path, bucket: Bucket, tmp_path: Path) -> None:
    """The index is fetched once, and of images only what is asked for: neighbours together, each by itself."""
    dataset = ArrayRecordDataset(remote)
    assert not any("array_record" in path for _, path in bucket.requests)
    bucket.requests.clear()
    stored = dataset.fetch([3, 4, 70, 5])
    reads = [path for method, path in bucket.requests if method == "GET" and "array_record" in path]
    assert len(reads) == 2 and all(dataset.item(i, stored[i]) for i in stored)
    bucket.requests.clear()
    ArrayRecordDataset(remote)
    assert not any("index-" in path for method, path in bucket.requests if method == "GET")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pi0.datasets.arrayrecord, "MAX_GAP", 10)
        bucket.requests.clear()
        dataset.fetch([3, 30])
        assert len([path for method, path in bucket.requests if "array_record" in path]) == 2


@pytest.mark.parametrize("fault", ["503", "cut", "slow"])
def test_requests_are_repeated(fault: str, remote: Path, bucket: Bucket) -> None:
    dataset = ArrayRecordDataset(remote)
    with bucket.fault(times(1, fault, "GET", "array_record")):
        np.testing.assert_array_equal(dataset[3][CAMERA], source()[3][CAMERA])


def test_in_s3(built: Path, s3: str) -> None:
    upload(built, as_path(f"{s3}/dataset"))
    local, there = ArrayRecordDataset(built), ArrayRecordDataset(f"{s3}/dataset")
    for i in (0, 30, 59):
        for name, value in local[i].items():
            np.testing.assert_array_equal(there[i][name], value, err_msg=name)


def test_lost_access(remote: Path, bucket: Bucket) -> None:
    dataset = ArrayRecordDataset(remote)
    with (
        bucket.fault(lambda method, path: "403" if "array_record" in path else None),
        pytest.raises(ConnectionError, match="cannot read gs://"),
    ):
        dataset[3]


def test_sizes(built: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"size \(24, 32\), and \(16, 16\) is asked for: make it again .* --size 16x16"):
        ArrayRecordDataset(built, image_size=(16, 16))
    robot = make_robot("libero")
    recorded = writer.build_records(source(image_size=None), "", tmp_path / "recorded", Encoding("png"))
    resized = ArrayRecordDataset(recorded, image_size=(16, 16))
    np.testing.assert_array_equal(resized[3][CAMERA], source(image_size=(16, 16))[3][CAMERA])
    assert ArrayRecordDataset(recorded)[3][CAMERA].shape == source(image_size=None)[3][CAMERA].shape
    with pytest.raises(ValueError, match="raw frames are mapped into memory"):
        source(cache="gs://bucket/frames")
    assert not robot.adapts_images


def test_a_robot_that_adapts_images(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    robot = make_robot("metaworld")
    monkeypatch.setattr(type(robot), "adapts_images", True)
    with pytest.raises(ValueError, match="recorded size, and here they have"):
        open_dataset(built, robot, format="arrayrecord")


def test_in_memory(remote: Path, bucket: Bucket) -> None:
    dataset = ArrayRecordDataset(remote, image_size=SIZE, cache="memory")
    first = dataset[3]
    bucket.requests.clear()
    assert dataset.fetch([3]) == {} and dataset[3][CAMERA] is first[CAMERA] and not bucket.requests


def test_the_command(tmp_path: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(ROOT), "--to", "arrayrecord", "--size", "24x32", "--workers", "1"]
    main([*arguments, "--out", f"{bucket.address}/out", "--encoding", "jpeg:90"])
    assert "bytes per frame" in capsys.readouterr().out
    dataset = ArrayRecordDataset(f"{bucket.address}/out", actions=("action",), image_size=SIZE)
    assert dataset[0][CAMERA].shape == (*SIZE, 3)
    for wrong, problem in (
        ([], "needs --out"),
        (["--out", "x", "--cache", str(tmp_path)], "--cache: not with --to arrayrecord"),
        (["--out", "x", "--encoding", "jpeg"], "unknown encoding"),
        (["--to", "raw", "--columns", "action"], "--columns: not with --to raw"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, *wrong])
        assert problem in capsys.readouterr().err
