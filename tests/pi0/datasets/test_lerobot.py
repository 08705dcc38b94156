from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi0.datasets import DatasetError, LeRobotDataset
from pi0.datasets.lerobot import Video
from pi0.sample import METAWORLD

EXPECTED = dict(np.load(Path(__file__).parents[2] / "datasets" / "metaworld_v30_expected.npz"))
CAMERAS = ("corner", "wrist")


@pytest.fixture(scope="module")
def dataset() -> LeRobotDataset:
    return LeRobotDataset(METAWORLD, action_horizon=EXPECTED["action_chunk"].shape[1])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(METAWORLD, tmp_path / "dataset"))


def test_whole(dataset: LeRobotDataset):
    assert dataset.fps == EXPECTED["fps"]
    assert len(dataset) == EXPECTED["total_frames"]
    assert len(dataset.episodes) == 16 and len(dataset.tasks) == 4
    assert dataset.table("observation.state").shape == (1165, 4)


@pytest.mark.parametrize("n", range(len(EXPECTED["index"])))
def test_frames_are_lerobot_s(dataset: LeRobotDataset, n: int):
    i = int(EXPECTED["index"][n])
    item = dataset[i]
    np.testing.assert_array_equal(item["observation.state"], EXPECTED["state"][n])
    np.testing.assert_array_equal(item["action"], EXPECTED["action_chunk"][n])
    np.testing.assert_array_equal(item["action_is_pad"], EXPECTED["action_is_pad"][n])
    assert item["task"] == EXPECTED["task"][n]
    assert (item["index"], item["episode_index"], item["frame_index"]) == (
        i,
        EXPECTED["episode_index"][n],
        EXPECTED["frame_index"][n],
    )

    def distances(j: int) -> np.ndarray:
        """Mean difference of what is returned for frame j from what is expected for frame i, by camera."""
        found = dataset[j]
        return np.array(
            [np.abs(found[f"observation.images.{c}"] - EXPECTED[c][n].astype(float)).mean() for c in CAMERAS]
        )

    # Two decoders may convert colours with other rounding; the encoder made some neighbours of one camera equal, so
    # the right frame is told from its neighbours by both cameras together.
    assert (distances(i) < 2).all()
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
    with pytest.raises(DatasetError, match="99"):
        LeRobotDataset(METAWORLD, episodes=[99])
    with pytest.raises(DatasetError, match="repeat"):
        LeRobotDataset(METAWORLD, episodes=[])
    with pytest.raises(DatasetError, match="front"):
        LeRobotDataset(METAWORLD, cameras=["front"])
    with pytest.raises(ValueError, match="action_horizon"):
        LeRobotDataset(METAWORLD, action_horizon=0)


def edit_info(root: Path, **values: object) -> None:
    file = root / "meta" / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_column(root: Path, name: str, row: int, value: object) -> None:
    file = root / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(file)
    column = table[name].to_pylist()
    column[row] = value
    index = table.column_names.index(name)
    pq.write_table(table.set_column(index, name, pa.array(column, table.schema.field(name).type)), file)


def test_unsupported_version(copy: Path):
    edit_info(copy, codebase_version="v1.6")
    with pytest.raises(DatasetError, match=r"v1\.6.*v3\.0"):
        LeRobotDataset(copy)


def test_frame_count(copy: Path):
    edit_info(copy, total_frames=1000)
    with pytest.raises(DatasetError, match=r"1165.*1000"):
        LeRobotDataset(copy)


@pytest.mark.parametrize(
    "file",
    [
        "meta/info.json",
        "meta/tasks.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "data/chunk-000/file-000.parquet",
        "videos/observation.images.wrist/chunk-000/file-000.mp4",
    ],
)
def test_missing_file(copy: Path, file: str):
    (copy / file).unlink()
    with pytest.raises(DatasetError, match=Path(file).parts[1].split(".parquet")[0].split("/")[0]):
        LeRobotDataset(copy)


def test_truncated_table(copy: Path):
    file = copy / "data" / "chunk-000" / "file-000.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=r"file-000\.parquet"):
        LeRobotDataset(copy)


@pytest.mark.parametrize("column", ["observation.state", "action"])
def test_nan(copy: Path, column: str):
    edit_column(copy, column, 59 + 4, [0.0, float("nan"), 0.0, 0.0])
    with pytest.raises(DatasetError, match=rf"episode 1, frame 4: {column}\[1\] is nan"):
        LeRobotDataset(copy)


def test_rows_out_of_order(copy: Path):
    edit_column(copy, "frame_index", 3, 7)
    with pytest.raises(DatasetError, match="episode 0, frame 3: frame_index is 7, expected 3"):
        LeRobotDataset(copy)


def test_missing_row(copy: Path):
    edit_column(copy, "episode_index", 3, 1)
    with pytest.raises(DatasetError, match="episode 0: 58 rows"):
        LeRobotDataset(copy)


def test_truncated_video(copy: Path):
    file = copy / "videos" / "observation.images.corner" / "chunk-000" / "file-000.mp4"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DatasetError, match=r"episode 15, frame 12: .*file-000\.mp4"):
        LeRobotDataset(copy)[1100]


def test_a_clip_that_does_not_hold_its_episode(copy: Path):
    """Its last frames would show the next episode's first."""
    file = copy / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table, name = pq.read_table(file), "videos/observation.images.wrist/to_timestamp"
    ends = table[name].to_pylist()
    ends[1] -= 3 / 20
    pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(ends)), file)
    with pytest.raises(DatasetError, match=r"wrist.*episode 1.*88 frames"):
        LeRobotDataset(copy)


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


def write_h264(file: Path, fps: int, frames: int) -> None:
    """Frame n is a grey of level 16 + 4n, so that its number can be read off the picture; with B-frames."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", fps, options={"g": "25", "bf": "3", "b_strategy": "0", "crf": "10"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for n in range(frames):
            picture = np.full((64, 64, 3), 16 + 4 * n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("fps", [30, 50])
def test_h264_with_reordered_frames(fps: int, tmp_path):
    write_h264(tmp_path / "x.mp4", fps, 50)
    video, order = Video(tmp_path / "x.mp4", fps), [*range(50), *np.random.default_rng(0).permutation(50)]
    # Rounded on the way to YUV and back: a level is off by 1 or so, of the 4 that tell neighbours apart.
    assert [round((video.frame(n / fps).mean() - 16) / 4) for n in order] == order
    with pytest.raises(DatasetError, match="ends before"):
        video.frame(51 / fps)
