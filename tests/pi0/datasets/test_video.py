from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from pi0.datasets.errors import DataError
from pi0.datasets.video import Video
from pi0.datasets.writer import open_encoder

GOP = 25
CODECS = {
    "h264": ("libx264", {"bf": "3", "b_strategy": "0", "crf": "10"}),
    "h264, open groups": ("libx264", {"bf": "3", "b_strategy": "0", "crf": "10", "x264-params": "open-gop=1"}),
    "av1": ("libsvtav1", {"crf": "10", "preset": "12"}),
    "h264 without reordering": ("libx264", {"bf": "0", "sc_threshold": "0", "crf": "10"}),
}


def write_video(file: Path, fps: int, frames: int, codec: str = "h264") -> None:
    """Frame n is a grey of level 16 + 4n (n < 56), so that its number can be read off the picture."""
    name, options = CODECS[codec]
    with av.open(str(file), "w") as container:
        stream = container.add_stream(name, fps, options={"g": str(GOP)} | options)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        open_encoder(stream)
        for n in range(frames):
            picture = np.full((64, 64, 3), 16 + 4 * (n % 56), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def level(picture: np.ndarray) -> int:
    """A frame's number. Rounded to YUV and back, a level is off by 1 or so, of the 4 that tell neighbours apart."""
    return round((picture.mean() - 16) / 4)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("fps", [30, 50])
def test_every_frame_in_any_order(codec: str, fps: int, tmp_path: Path):
    write_video(tmp_path / "x.mp4", fps, 55, codec)
    video, order = Video(tmp_path / "x.mp4", fps), [*range(55), *np.random.default_rng(0).permutation(55)]
    video.check(0.0, np.inf, 55)
    assert [level(video.frame(n / fps)) for n in order] == order
    with pytest.raises(DataError, match="ends before"):
        video.frame(56 / fps)


def test_times_need_not_be_exact(tmp_path: Path):
    write_video(tmp_path / "x.mp4", 30, 50)
    video = Video(tmp_path / "x.mp4", 30)
    assert [level(video.frame((n + off) / 30)) for n in (3, 4, 40, 24, 25) for off in (-0.3, 0.3)] == [
        n for n in (3, 4, 40, 24, 25) for _ in range(2)
    ]


def test_what_is_decoded(tmp_path: Path):
    """Reading on within a group of pictures, and no way back further than its keyframe."""
    write_video(tmp_path / "x.mp4", 30, 55, "h264 without reordering")
    video, counts = Video(tmp_path / "x.mp4", 30), []
    for n in (0, 1, 10, 24, 26, 25, 54):  # on, on, skip within the group, skip, next group, back to a keyframe, last
        before = video.decoded
        video.frame(n / 30)
        counts.append(video.decoded - before)
    assert counts == [1, 1, 9, 14, 2, 1, 5]


def test_no_index(tmp_path: Path):
    write_video(tmp_path / "x.mkv", 30, 5)
    with pytest.raises(DataError, match=r"x\.mkv: has no index of its frames; write it as MP4"):
        Video(tmp_path / "x.mkv", 30).frame(0.0)
