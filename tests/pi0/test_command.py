"""What all commands share."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

GS = "gs://bucket/out"
WRITING = {
    "pi0_jax.training.command": ["--config", "debug", "--workdir", GS],
    "convert.conversion": ["tests/golden/pi0/checkpoint", GS, "--to", "pi0_torch"],
    "pi0_eval.replay": ["x", "bundled://metaworld_v30", "--out", GS],
    "pi0_eval.scores": ["x", "--json", GS],
    "pi0_eval.parity.command": ["x", "y", "--html", GS],
    "pi0_eval.bench": ["--json", GS],
    "pi0_eval.demo": ["--workdir", GS],
    "pi0.datasets.statistics": [
        *["x", "--robot", "metaworld", "--action-horizon", "5", "--asset-id", "metaworld", "--out"],
        GS,
    ],
    "pi0.datasets.cache": ["bundled://metaworld_v30", "--cache", GS],
    "pi0.datasets.fit_fast": ["bundled://metaworld_v30", GS, "--robot", "metaworld"],
}


@pytest.mark.parametrize("module", WRITING)
def test_addresses_that_cannot_be_written_to_are_refused(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where a folder named gs: would be made
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(module).main(WRITING[module])
    assert exit.value.code != 0
    assert f"{GS} cannot be written to" in capsys.readouterr().err
    assert os.listdir() == []
