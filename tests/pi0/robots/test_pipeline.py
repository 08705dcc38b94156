from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from pi0.assets import Assets, AssetsError
from pi0.datasets.fit_fast import action_chunks
from pi0.datasets.lerobot import LeRobotDataset
from pi0.observation import Observation
from pi0.robots.metaworld import MetaWorld
from pi0.robots.normalize import EPSILON, NormStats
from pi0.robots.pipeline import Pipeline
from pi0.sample import METAWORLD
from pi0.tokenizers.fast import FASTError, FASTTokenizer
from pi0.tokenizers.text import BUNDLED, TextTokenizer
from pi0.variants import get_variant

DATASET = LeRobotDataset(METAWORLD, action_horizon=5, episodes=[0])


def assets(variant: str) -> Assets:
    return Assets(
        get_variant(variant),
        norm_stats={
            "state": NormStats.from_data(DATASET.table("observation.state")),
            "actions": NormStats.from_data(DATASET.table("action")),
        },
        asset_id="metaworld",
        normalization="quantile",
        tokenizer=TextTokenizer(BUNDLED).reference(),
        robot="metaworld",
    )


@pytest.mark.parametrize("variant", ["tiny", "tiny_pi05"])
def test_from_saved_assets_to_the_contract_and_back(variant: str, tmp_path):
    """What a checkpoint carries is enough to feed the model and to read its actions."""
    assets(variant).save(tmp_path / "assets")
    loaded = Assets.load(tmp_path)
    pipeline = Pipeline.from_assets(loaded)
    item = DATASET[10]
    row = pipeline(item)
    actions = row.pop("actions")
    observation = Observation.from_dict({k: np.asarray(v)[None] for k, v in row.items()}, loaded.model)
    assert observation.state.shape == (1, 7) and actions.shape == (5, 7)
    # Normalized actions went through float32: a few units of its last place, times a range of about 2.
    np.testing.assert_allclose(pipeline.actions(actions), item["action"], atol=2e-6)


def test_pi05_reads_the_state_in_its_prompt():
    loaded = assets("tiny_pi05")
    wide = dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, max_token_len=64))
    row = Pipeline.from_assets(wide)(DATASET[10])
    text = TextTokenizer(BUNDLED).decode(row["tokenized_prompt"][row["tokenized_prompt_mask"]])
    assert text.startswith("Task: reach the red target, State: ") and text.endswith(";\nAction: ")
    row = Pipeline.from_assets(dataclasses.replace(wide, state_in_prompt=False))(DATASET[10])  # openpi's `pi05_libero`
    text = TextTokenizer(BUNDLED).decode(row["tokenized_prompt"][row["tokenized_prompt_mask"]])
    assert text == "reach the red target\n"


def fast_assets(folder: Path) -> Assets:
    """Assets of a π0-FAST with an action tokenizer fitted on the recordings, saved in `folder`."""
    chunks = action_chunks(DATASET, MetaWorld())
    fast = FASTTokenizer.fit(list(NormStats.from_data(chunks[:, 0]).apply(chunks, "quantile")), vocab_size=300)
    fast.save(folder)
    model = get_variant("tiny_pi0_fast", vocab_size=512 + 128 + 300, max_token_len=90)
    return dataclasses.replace(
        assets("tiny"),
        model=dataclasses.replace(model, image_keys=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")),
        action_tokenizer=fast.reference(),
    )


def test_pi0_fast_from_saved_assets_to_the_contract_and_back(tmp_path):
    fast_assets(tmp_path / "fitted").save(tmp_path / "checkpoint" / "assets")
    shutil.rmtree(tmp_path / "fitted")
    loaded = Assets.load(tmp_path / "checkpoint")
    pipeline = Pipeline.from_assets(loaded)
    item = DATASET[10]
    row = pipeline(item)
    row.pop("actions")
    observation = Observation.from_dict({k: np.asarray(v)[None] for k, v in row.items()}, loaded.model)
    answer = observation.tokenized_prompt[observation.token_loss_mask]
    # Off by 0.05 at most in each of the 5 coefficients, in units of half the quantiles' range.
    stats = loaded.norm_stats["actions"]
    limit = 0.05 * np.sqrt(5) * (stats.q99 - stats.q01 + EPSILON) / 2
    error = np.abs(pipeline.actions(answer) - item["action"])
    assert (error <= limit + 1e-6).all()  # and a few of float32's last places
    black = row["image/right_wrist_0_rgb"], row["image_mask/right_wrist_0_rgb"]  # the arm has no such camera
    assert black[0].shape == (28, 42, 3) and not black[0].any() and black[1]
    with pytest.raises(FASTError):
        pipeline.actions(answer[:-3])
    with pytest.raises(AssetsError, match="action_tokenizer"):
        Pipeline.from_assets(dataclasses.replace(loaded, action_tokenizer=None))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"robot": None}, "robot"),
        ({"robot": "toaster"}, "toaster"),
        ({"norm_stats": None}, "norm_stats"),
        ({"model": dataclasses.replace(get_variant("tiny"), vocab_size=300)}, "300"),
    ],
)
def test_refusals(change: dict, named: str):
    with pytest.raises(AssetsError, match=named):
        Pipeline.from_assets(dataclasses.replace(assets("tiny"), **change))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"robot": "droid"},
            "assets 'metaworld' do not fit Droid: norm stats of 'state' have 4 dimensions",
        ),
        ({"norm_stats": {}}, "norm stats lack"),
        ({"normalization": "minmax"}, "unknown normalization mode"),
        (
            {"norm_stats": {key: NormStats(np.zeros(4), np.ones(4)) for key in ("state", "actions")}},
            "mode 'quantile' needs q01 and q99",
        ),
        (
            {"robot": {"name": "generic", "cameras": {"a": "base_0_rgb"}, "state": [[0, 5]], "actions": [[0, 4]]}},
            "norm stats of 'state' have 4 dimensions, the robot has 5",
        ),
        (
            {"robot": {"name": "metaworld", "cameras": {"corner": "base_0_rgb", "wrist": "third_rgb"}}},
            r"its cameras are the model's \['third_rgb'\]; the model has",
        ),
    ],
)
def test_norm_stats_are_checked_at_load(change: dict, problem: str):
    with pytest.raises(AssetsError, match=problem):
        Pipeline.from_assets(dataclasses.replace(assets("tiny"), **change))


def test_a_missing_prompt_is_named_by_the_frame_s_keys():
    live = {"corner": np.zeros((6, 8, 3), np.uint8), "wrist": np.zeros((6, 8, 3), np.uint8), "state": np.zeros(4)}
    with pytest.raises(ValueError, match=r"no `prompt` or `task` in a frame of \['corner', 'state', 'wrist'\]"):
        Pipeline.from_assets(assets("tiny"))(live)


def test_a_prompt_that_would_be_cut(tmp_path, caplog: pytest.LogCaptureFixture):
    """Where the state would be cut it is refused; a plain prompt is cut with a warning, as openpi does."""
    item, long = DATASET[10], {"prompt": "open the drawer " * 60}
    long = {key: value for key, value in item.items() if key != "task"} | long
    plain = Pipeline.from_assets(assets("tiny"))
    assert plain(long, actions=False)["tokenized_prompt_mask"].all() and "was cut" in caplog.text
    state, fast = assets("tiny_pi05"), fast_assets(tmp_path / "fast")
    state = dataclasses.replace(state, model=dataclasses.replace(state.model, max_token_len=64))
    recipe = dataclasses.replace(state, subtasks=True)
    for own in (state, fast, recipe):
        pipeline = Pipeline.from_assets(own)
        with pytest.raises(ValueError, match=f"has more than the {own.model.max_token_len} tokens"):
            pipeline(long, actions=False)
        before = pipeline.tokenizer.truncated
        assert pipeline(long)["tokenized_prompt_mask"].all() and pipeline.tokenizer.truncated == before + 1  # training
        row, length = pipeline(item, actions=False), own.model.max_token_len
        used = int(row["tokenized_prompt_mask"].sum())
        assert len(row["tokenized_prompt"]) == length and used < length
        # Exactly as long as the prompt: whole. One less: refused.
        exact = dataclasses.replace(own, model=dataclasses.replace(own.model, max_token_len=used))
        np.testing.assert_array_equal(
            Pipeline.from_assets(exact)(item, actions=False)["tokenized_prompt"], row["tokenized_prompt"][:used]
        )
        less = dataclasses.replace(own, model=dataclasses.replace(own.model, max_token_len=used - 1))
        with pytest.raises(ValueError, match="would be cut"):
            Pipeline.from_assets(less)(item, actions=False)
    stateless = dataclasses.replace(state, state_in_prompt=False)
    assert Pipeline.from_assets(stateless)(long, actions=False)["tokenized_prompt_mask"].all()


@pytest.mark.parametrize("mode", ["zscore", "quantile"])
def test_a_state_far_outside_of_training_is_logged_once_for_each_dimension(mode: str, caplog: pytest.LogCaptureFixture):
    pipeline = Pipeline.from_assets(dataclasses.replace(assets("tiny"), normalization=mode))
    item = DATASET[10] | {"task": "go"}
    pipeline(item, actions=False)
    pipeline(item | {"observation.state": np.float32([1000, 0, 0, 0])})  # recorded: pi0-stats warns of outliers
    assert not caplog.records
    for value in (1000.0, 2000.0):
        row = pipeline(item | {"observation.state": np.float32([value, *item["observation.state"][1:]])}, actions=False)
        assert row["state"][0] > 100
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "state[0] is 1000, far outside of what the model was trained on" in caplog.text
    far = np.float32([-1000, *item["observation.state"][1:3], -1000])
    pipeline(item | {"observation.state": far}, actions=False)
    assert len(caplog.records) == 2 and "state[3] is -1000" in caplog.text
