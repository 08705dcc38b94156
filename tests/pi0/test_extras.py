"""A robot that only infers needs no extra, and what does need one names it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BLOCKED = ("av", "pyarrow", "matplotlib", "scipy")

SCRIPT = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))  # None: the import of it fails
import numpy as np
from pathlib import Path
import pi0.policy.policy
from pi0.assets import Assets
from pi0.datasets.registry import open_dataset
from pi0.plots import plot_cameras
from pi0.plugins import MissingExtraError
from pi0.robots.normalize import NormStats
from pi0.robots.pipeline import Pipeline
from pi0.robots.registry import make_robot
from pi0.tokenizers.fast import FASTTokenizer
from pi0.tokenizers.text import BUNDLED, TextTokenizer
from pi0.variants import get_variant

stats = NormStats.from_data(np.random.default_rng(0).normal(size=(9, 4)))
assets = Assets(get_variant("tiny"), dict(state=stats, actions=stats), "arm", "zscore",
                TextTokenizer(BUNDLED).reference(), "metaworld")
pipeline = Pipeline.from_assets(assets)
image = np.zeros((48, 64, 3), np.uint8)
row = pipeline(dict(corner=image, wrist=image, state=np.zeros(4), prompt="open the drawer"))
assert row["image/base_0_rgb"].any() == False and row["tokenized_prompt_mask"].any()
assert pipeline.actions(np.zeros((5, 7)), row["state"]).shape == (5, 4)
fast = FASTTokenizer("bundled://fast_tokenizer")
assert fast.decode(fast.encode(np.zeros((10, 4))))[0].shape == (10, 4)

for work, extra in ((lambda: open_dataset("bundled://metaworld_v30", make_robot("metaworld")), "data"),
                    (lambda: plot_cameras(dict(a=image[None]), Path("x.png")), "plots")):
    try:
        work()
    except MissingExtraError as error:
        assert f"pip install 'pi0[{{extra}}]'" in str(error), error
    else:
        raise AssertionError("no error")
"""


def test_inference_needs_no_extra():
    command = [sys.executable, "-c", SCRIPT.format(blocked=BLOCKED)]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
