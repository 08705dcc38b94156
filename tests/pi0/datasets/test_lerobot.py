from __future__ import annotations

import functools
import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import av
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi0.datasets.errors import DataError
from pi0.datasets.lerobot import LeRobotDataset
from pi0.robots.transforms import resize_with_pad
from pi0.sample import METAWORLD

HERE = Path(__file__).parents[2] / "datasets"
RECORDINGS = {
    "metaworld_v30": METAWORLD,
    "metaworld_v21": HERE / "metaworld_v21",
    "metaworld_v21_images": HERE / "metaworld_v21_images",
}
CAMERAS = ("corner", "wrist")
V21_EPISODES = [0, 1, 3, 4, 5, 8, 10, 12, 13, 15]  # those whose videos are in tests/datasets


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    """What LeRobot's own reader returned for some frames."""
    return dict(np.load(HERE / f"{name}_expected.npz"))


@functools.cache
def recording(name: str) -> LeRobotDataset:
    episodes = V21_EPISODES if name == "metaworld_v21" else None
    return LeRobotDataset(RECORDINGS[name], action_horizon=10, episodes=episodes)


@pytest.fixture(scope="module")
def dataset() -> LeRobotDataset:
    return recording("metaworld_v30")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(METAWORLD, tmp_path / "dataset"))


@pytest.mark.parametrize("name", RECORDINGS)
def test_whole(name: str):
    dataset, numbers = recording(name), expected(name)
    assert dataset.fps == numbers["fps"]
    assert sum(episode.length for episode in dataset.every_episode) == numbers["total_frames"]
    assert dataset.table("observation.state").shape == (len(dataset), 4)
    assert dataset.cameras == [f"observation.images.{camera}" for camera in CAMERAS]
    assert [dataset.starts.tolist(), dataset.table("frame_index")[dataset.starts[:-1]].tolist()] == [
        np.cumsum([0] + [e.length for e in dataset.episodes]).tolist(),
        [0] * len(dataset.episodes),
    ]


@pytest.mark.parametrize(("name", "n"), [(name, n) for name in RECORDINGS for n in range(len(expected(name)["index"]))])
def test_frames_are_lerobot_s(name: str, n: int):
    dataset, numbers = recording(name), {key: value[n] for key, value in expected(name).items() if value.ndim}
    i = int(np.flatnonzero(dataset.table("index") == numbers["index"])[0])
    item = dataset[i]
    np.testing.assert_array_equal(item["observation.state"], numbers["state"])
    np.testing.assert_array_equal(item["action"], numbers["action_chunk"])
    np.testing.assert_array_equal(item["action_is_pad"], numbers["action_is_pad"])
    assert item["task"] == numbers["task"]
    assert all(item[key] == numbers[key] for key in ("index", "episode_index", "frame_index"))

    def distances(j: int) -> np.ndarray:
        """Mean difference of what is returned for frame j from what is expected for frame i, by camera."""
        found = dataset[j]
        return np.array([np.abs(found[f"observation.images.{c}"] - numbers[c].astype(float)).mean() for c in CAMERAS])

    # Two decoders may convert colours with other rounding; the encoder made some neighbours of one camera equal, so
    # the right frame is told from its neighbours by both cameras together.
    assert (distances(i) < 2).all()
    assert "images" not in name or not distances(i).any(), "a PNG is exact"
    for j in (i - 1, i + 1):
        if 0 <= j < len(dataset):
            assert (distances(i) <= distances(j)).all() and distances(i).sum() < distances(j).sum()


def test_order_does_not_matter(dataset: LeRobotDataset):
    """Seeking gives the same pictures as reading on."""
    camera = "observation.images.corner"
    straight = [dataset[i][camera] for i in range(200)]
    for i in np.random.default_rng(0).permutation(200)[:40]:
        np.testing.assert_array_equal(dataset[int(i)][camera], straight[i])


def test_chosen_episodes_and_cameras(dataset: LeRobotDataset):
    part = LeRobotDataset(METAWORLD, action_horizon=10, episodes=[5, 2], cameras=["observation.images.wrist"])
    lengths = [episode.length for episode in part.episodes]
    assert [episode.index for episode in part.episodes] == [5, 2] and len(part) == sum(lengths)
    item = part[lengths[0]]
    assert (item["episode_index"], item["frame_index"]) == (2, 0) and "observation.images.corner" not in item
    np.testing.assert_array_equal(item["observation.images.wrist"], dataset[item["index"]]["observation.images.wrist"])
    assert part[lengths[0] - 1]["action_is_pad"].tolist() == [False] + [True] * 9


def test_a_used_dataset_can_be_sent_to_another_process(dataset: LeRobotDataset):
    item, again = dataset[7], pickle.loads(pickle.dumps(dataset))[7]
    np.testing.assert_array_equal(item["observation.images.corner"], again["observation.images.corner"])


@pytest.mark.parametrize("i", [-1, 1165])
def test_beyond_the_frames(dataset: LeRobotDataset, i: int):
    with pytest.raises(IndexError, match=str(i)):
        dataset[i]


def test_unknown_choices():
    with pytest.raises(DataError, match="99"):
        LeRobotDataset(METAWORLD, episodes=[99])
    with pytest.raises(DataError, match="repeat"):
        LeRobotDataset(METAWORLD, episodes=[])
    with pytest.raises(DataError, match="front"):
        LeRobotDataset(METAWORLD, cameras=["front"])
    with pytest.raises(ValueError, match="action_horizon"):
        LeRobotDataset(METAWORLD, action_horizon=0)


def edit_info(root: Path, **values: object) -> None:
    file = root / "meta" / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("version", "advice"), [("v2.0", "convert_dataset_v20_to_v21"), ("v1.6", "convert_dataset_v1_to_v2"), ("v4.0", "")]
)
def test_unsupported_version(copy: Path, version: str, advice: str):
    edit_info(copy, codebase_version=version)
    with pytest.raises(DataError, match=rf"{version}; supported are v2\.1, v3\.0: convert it with LeRobot.*{advice}"):
        LeRobotDataset(copy)


def test_addresses(copy: Path, monkeypatch: pytest.MonkeyPatch):
    assert LeRobotDataset("bundled://metaworld_v30", episodes=[0])[0]["task"] == "reach the red target"
    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: calls.append((a, k)) or str(copy))
    assert len(LeRobotDataset("hf://datasets/someone/metaworld", episodes=[3])) == 44
    assert calls[0][0] == ("someone/metaworld",) and calls[0][1]["repo_type"] == "dataset"


def test_many_chunks_v21(tmp_path: Path):
    """Two episodes per chunk, as `chunks_size` says."""
    root = Path(shutil.copytree(RECORDINGS["metaworld_v21"], tmp_path / "dataset"))
    edit_info(root, chunks_size=2)
    for file in [*root.glob("data/*/*.parquet"), *root.glob("videos/*/*/*.mp4")]:
        chunk = int(file.stem.removeprefix("episode_")) // 2
        target = Path(*(f"chunk-{chunk:03d}" if part == "chunk-000" else part for part in file.parts))
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    assert_same(LeRobotDataset(root, action_horizon=10, episodes=V21_EPISODES), recording("metaworld_v21"))


def test_many_files_and_chunks_v30(tmp_path: Path):
    """Every table and video cut in files, of which the last are in a second chunk; several episodes in each."""
    root = Path(shutil.copytree(METAWORLD, tmp_path / "dataset"))
    episodes = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet")
    rows, cuts, places = (
        pq.read_table(root / "data/chunk-000/file-000.parquet"),
        (0, 5, 9, 16),
        ((0, 0), (0, 1), (1, 0)),
    )
    table, ends = episodes.to_pydict(), episodes["dataset_to_index"].to_pylist()
    for (chunk, number), first, last in zip(places, cuts, cuts[1:], strict=False):
        data = root / f"data/chunk-{chunk:03d}/file-{number:03d}.parquet"
        data.parent.mkdir(exist_ok=True)
        begin = ends[first - 1] if first else 0
        pq.write_table(rows.slice(begin, ends[last - 1] - begin), data)
        for camera in CAMERAS:
            key = f"videos/observation.images.{camera}"
            video = root / f"{key}/chunk-{chunk:03d}/file-{number:03d}.mp4"
            video.parent.mkdir(exist_ok=True)
            remux(METAWORLD / f"{key}/chunk-000/file-000.mp4", video, begin, ends[last - 1])
            for n in range(first, last):
                table[f"{key}/chunk_index"][n], table[f"{key}/file_index"][n] = chunk, number
                table[f"{key}/from_timestamp"][n] -= begin / 20
                table[f"{key}/to_timestamp"][n] -= begin / 20
        for n in range(first, last):
            table["data/chunk_index"][n], table["data/file_index"][n] = chunk, number
    whole = pa.table(table, episodes.schema)
    (root / "meta/episodes/chunk-001").mkdir()
    pq.write_table(whole.slice(10), root / "meta/episodes/chunk-001/file-000.parquet")
    pq.write_table(whole.slice(0, 10), root / "meta/episodes/chunk-000/file-000.parquet")
    assert_same(LeRobotDataset(root, action_horizon=10), recording("metaworld_v30"))


def test_images_v30(tmp_path: Path):
    """Several episodes in a file, whose groups of rows end anywhere."""
    source = RECORDINGS["metaworld_v21_images"]
    rows = pa.concat_tables([pq.read_table(file) for file in sorted(source.glob("data/*/*.parquet"))])
    (tmp_path / "data/chunk-000").mkdir(parents=True)
    pq.write_table(rows, tmp_path / "data/chunk-000/file-000.parquet", row_group_size=25)
    (tmp_path / "meta/episodes/chunk-000").mkdir(parents=True)
    places = {"dataset_from_index": [0, 59], "data/chunk_index": [0, 0], "data/file_index": [0, 0]}
    lengths = np.bincount(rows["episode_index"].to_numpy())
    table = {"episode_index": [0, 1], "length": lengths} | places
    pq.write_table(pa.table(table), tmp_path / "meta/episodes/chunk-000/file-000.parquet")
    tasks = recording("metaworld_v21_images").tasks
    pq.write_table(pa.table({"task_index": list(tasks), "task": list(tasks.values())}), tmp_path / "meta/tasks.parquet")
    shutil.copy(source / "meta/info.json", tmp_path / "meta")
    path = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    edit_info(tmp_path, codebase_version="v3.0", data_path=path)
    assert_same(LeRobotDataset(tmp_path, action_horizon=10), recording("metaworld_v21_images"))


def remux(source: Path, target: Path, first: int, last: int) -> None:
    """Copy some frames of an AV1 video, from a keyframe on, into a file of their own that starts at 0."""
    with av.open(str(source)) as there, av.open(str(target), "w") as here:
        stream = here.add_stream_from_template(there.streams.video[0], opaque=True)
        packets = [packet for packet in there.demux(video=0) if packet.dts is not None][first:last]
        assert packets[0].is_keyframe
        start = packets[0].pts
        for packet in packets:
            packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, stream
            here.mux(packet)


def assert_same(a: LeRobotDataset, b: LeRobotDataset) -> None:
    """The same items, at the first, the last and a middle frame of each episode."""
    assert len(a) == len(b)
    for i in sorted({*a.starts[:-1], *(a.starts[1:] - 1), *((a.starts[:-1] + a.starts[1:]) // 2)}):
        one, other = a[int(i)], b[int(i)]
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=f"frame {i}, {key}")


def test_columns_of_other_names(tmp_path: Path):
    """State and actions in several columns, one of them of plain numbers, as some recordings have them."""
    root = Path(shutil.copytree(RECORDINGS["metaworld_v21_images"], tmp_path / "dataset"))
    info = json.loads((root / "meta/info.json").read_text())
    number = {"dtype": "float32", "shape": [1], "names": None}
    hand = {"dtype": "float64", "shape": [3], "names": None}
    edit_info(
        root, features=info["features"] | {"gripper": number, "hand": hand, "actions": info["features"]["action"]}
    )
    for file in root.glob("data/*/*.parquet"):
        table = pq.read_table(file)
        state = np.stack(table["observation.state"].to_numpy())
        table = table.append_column("gripper", pa.array(state[:, 3]))
        table = table.append_column("hand", pa.array(list(state[:, :3].astype(float)), pa.list_(pa.float64())))
        names = ["actions" if name == "action" else name for name in table.column_names]
        pq.write_table(table.rename_columns(names), file)
    dataset = LeRobotDataset(root, action_horizon=3, cameras=[], states=["hand", "gripper"], actions=["actions"])
    item, plain = dataset[60], recording("metaworld_v21_images")[60]
    np.testing.assert_array_equal(np.concatenate([item["hand"], item["gripper"]]), plain["observation.state"])
    np.testing.assert_array_equal(item["actions"], plain["action"][:3])
    assert "observation.state" not in item and item["gripper"].dtype == item["hand"].dtype == np.float32
    with pytest.raises(DataError, match=r"episode_000000\.parquet, episode 0: no columns \['action'\]"):
        LeRobotDataset(root)
    with pytest.raises(DataError, match=r"no column \['state'\]; there are \['observation\.state', "):
        LeRobotDataset(root, states=["state"])


def add_column(root: Path, name: str, values: pa.Array) -> None:
    file = root / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file).append_column(name, values), file)
    info = json.loads((root / "meta/info.json").read_text())
    edit_info(root, features=info["features"] | {name: {"dtype": "any", "shape": [1], "names": None}})


@pytest.mark.parametrize("how", ["subtask_index", "subtask", "language_persistent"])
def test_subtasks(copy: Path, how: str):
    """The three ways in which LeRobot has stored them: none in frame 0, "approach" from 1, "grasp" from 4 on."""
    frames = np.array(pq.read_table(copy / "data/chunk-000/file-000.parquet")["frame_index"])
    numbers = np.select([frames < 1, frames < 4], [-1, 0], 1)
    if how == "subtask_index":
        texts = pa.table({"subtask_index": [1, 0], "subtask": ["grasp", "approach"]})
        pq.write_table(texts, copy / "meta/subtasks.parquet")
        add_column(copy, how, pa.array(numbers))
    elif how == "subtask":
        add_column(copy, how, pa.array([[None, "approach", "grasp"][number + 1] for number in numbers]))
    else:
        plan = {"content": "all of it", "style": "plan", "timestamp": 0.0}
        steps = [{"content": c, "style": "subtask", "timestamp": t} for c, t in (("grasp", 0.2), ("approach", 0.05))]
        row = pa.struct([("content", pa.string()), ("style", pa.string()), ("timestamp", pa.float32())])
        add_column(copy, how, pa.array([[plan, *steps]] * len(frames), pa.list_(row)))
    dataset = LeRobotDataset(copy, episodes=[2, 5], cameras=[])
    start = int(dataset.starts[1])
    assert [dataset[start + i]["subtask"] for i in (0, 1, 3, 4, 20)] == ["", "approach", "approach", "grasp", "grasp"]
    assert dataset[start]["task"] and "subtask" not in recording("metaworld_v30")[0]


def test_reading_on_decodes_every_frame_once():
    dataset = LeRobotDataset(METAWORLD, cameras=["observation.images.corner"])
    for i in range(60):
        dataset[i]
    assert dataset.decoded == 60
    dataset[64]  # a keyframe is 63, as episode 1 starts with 59 and each group of pictures has two
    assert dataset.decoded == 62
    dataset[101]  # a keyframe itself
    assert dataset.decoded == 63


def test_few_files_stay_open(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pi0.datasets.lerobot.MAX_OPEN_FILES", 3)
    dataset = LeRobotDataset(RECORDINGS["metaworld_v21"], episodes=V21_EPISODES)
    for start in dataset.starts[:-1]:
        dataset[int(start)]
        assert len(dataset._files) <= 3


def test_resized_on_the_way():
    item = LeRobotDataset(METAWORLD, episodes=[1], image_size=(96, 160))[7]
    whole = LeRobotDataset(METAWORLD, episodes=[1])[7]
    for key in (f"observation.images.{camera}" for camera in CAMERAS):
        np.testing.assert_array_equal(item[key], resize_with_pad(whole[key], 96, 160))


def test_a_forked_process_reads_on(dataset: LeRobotDataset):
    """With the decoder in use before the fork, as a data loader's workers find it."""
    camera, order = "observation.images.corner", [100, 3, 700, 4]
    expected = [dataset[i][camera] for i in order]
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=lambda: there.send([dataset[i][camera] for i in order]), daemon=True)
    child.start()
    assert here.poll(60), "the forked process waits for ever"
    np.testing.assert_array_equal(here.recv(), expected)
