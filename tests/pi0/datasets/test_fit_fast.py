from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pi0.datasets.fit_fast import Report, action_chunks, main
from pi0.datasets.lerobot import LeRobotDataset
from pi0.datasets.statistics import dataset_statistics
from pi0.robots.metaworld import MetaWorld
from pi0.sample import METAWORLD
from pi0.tokenizers.fast import FASTTokenizer

ARGUMENTS = ["bundled://metaworld_v30", "--robot", "metaworld", "--action-horizon", "10", "--vocab-size", "512"]


def test_chunks_are_the_datasets_without_its_pictures() -> None:
    dataset = LeRobotDataset(METAWORLD, action_horizon=10, episodes=[3, 7])
    chunks = action_chunks(dataset, MetaWorld())
    assert chunks.shape == (len(dataset), 10, 4)
    np.testing.assert_array_equal(chunks[-3], dataset[len(dataset) - 3]["action"])


def test_fits_on_the_bundled_recordings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*ARGUMENTS, str(tmp_path / "fast"), "--held-out", "3", "7", "11", "15"])
    tokenizer = FASTTokenizer(tmp_path / "fast")
    assert (tokenizer.time_horizon, tokenizer.action_dim, tokenizer.scale) == (10, 4, 10)
    held_out = [3, 7, 11, 15]
    kept, others = (
        LeRobotDataset(METAWORLD, action_horizon=10, episodes=episodes, cameras=[])
        for episodes in ([e for e in range(16) if e not in held_out], held_out)
    )
    stats, chunks = dataset_statistics(kept, MetaWorld())["actions"].norm_stats(), action_chunks(others, MetaWorld())
    report = Report.measure(tokenizer, stats.apply(chunks, "quantile"))
    printed = capsys.readouterr().out
    assert report.row("held out") in printed and tokenizer.sha256 in printed
    assert report.binning == 40 and report.tokens_mean < report.binning / 4
    # Each of the 10 coefficients is off by at most 0.05, and the inverse transform keeps the length of that vector.
    assert report.error_max <= 0.05 * np.sqrt(10) and report.error_rms <= 0.05
    back = tokenizer.decode(tokenizer.encode(stats.apply(chunks[0], "quantile")))[0]
    assert np.abs(stats.invert(back, "quantile") - chunks[0]).max() <= 0.05 * np.sqrt(10) * np.ptp(chunks)


def test_same_recordings_same_bytes_in_another_process(tmp_path: Path) -> None:
    main([*ARGUMENTS, str(tmp_path / "here")])
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7"}
    command = [
        sys.executable,
        "-c",
        "from pi0.datasets.fit_fast import main; main()",
        *ARGUMENTS,
        str(tmp_path / "there"),
    ]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[3])
    here, there = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("here", "there"))
    assert here == there and len(here) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--robot", "toaster"], "unknown robot 'toaster'"),
        (["--held-out", "99"], "--held-out: validation episodes [99] must be"),
        (["--vocab-size", "100"], "at least 256 tokens"),
        (["--scale", "0"], "scale 0.0"),
        (["--action-horizon", "0"], "action_horizon is 0"),
    ],
)
def test_refusals(changes: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main([*ARGUMENTS, str(tmp_path / "fast"), *changes])
    error = capsys.readouterr().err
    assert error.startswith("pi0-fit-fast: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_overwriting_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*ARGUMENTS, str(tmp_path / "fast")])
    first = FASTTokenizer(tmp_path / "fast").sha256
    with pytest.raises(SystemExit, match="1"):
        main([*ARGUMENTS, str(tmp_path / "fast"), "--scale", "5"])
    assert "exists already" in capsys.readouterr().err and FASTTokenizer(tmp_path / "fast").sha256 == first
    main([*ARGUMENTS, str(tmp_path / "fast"), "--scale", "5", "--overwrite"])
    assert FASTTokenizer(tmp_path / "fast").scale == 5
