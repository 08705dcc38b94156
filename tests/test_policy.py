"""From a robot's raw frame to its actions, equal in both frameworks and in every layout of the checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import pi0_jax
import pi0_jax.sampler
import pi0_torch
import pi0_torch.sampler
from convert.checkpoints import Checkpoint
from convert.conversion import convert
from convert.layouts.registry import LAYOUTS, WRITABLE
from pi0.assets import Assets, AssetsError
from pi0.datasets.lerobot import LeRobotDataset
from pi0.families import FAMILIES
from pi0.observation import Observation, ObservationError
from pi0.robots.normalize import NormStats, save_norm_stats
from pi0.robots.pipeline import Pipeline
from pi0.robots.registry import make_robot
from pi0.robots.transforms import DeltaActions, Normalize
from pi0.sample import METAWORLD
from pi0.tokenizers.fast import FASTError, FASTTokenizer
from pi0.tokenizers.text import BUNDLED, TextTokenizer
from pi0.variants import get_variant
from pi0_jax.loading import load_model as load_jax
from pi0_torch.loading import load_model as load_torch
from pi0_torch.loading import parameters_of
from tests.pi0.robots.test_robots import CASES, frame
from tests.pi0_eval.parity.test_compare import random_checkpoint, write

pytestmark = pytest.mark.usefixtures("highest_precision")

FRAMEWORKS = {"jax": pi0_jax.Policy, "torch": pi0_torch.Policy}
FAST_SIZE = 300  # tokens
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb", "wrist_0_rgb")
SIZES = {"image_keys": CAMERAS, "action_dim": 16}  # room for every robot
CONFIGS = {
    "pi0": get_variant("tiny", **SIZES, max_token_len=24),
    "pi05": get_variant("tiny_pi05", **SIZES, max_token_len=96),
    "pi0_fast": get_variant(
        "tiny_pi0_fast",
        **SIZES,
        max_token_len=64,
        vocab_size=512 + 128 + FAST_SIZE,
        max_decoding_steps=24,
        remat="none",
    ),
}
TAUGHT = ("metaworld", "droid_fast", "libero_pi0")  # whose actions our π0-FAST learns to write


@pytest.fixture(autouse=True)
def one_thread():
    """For models this small, PyTorch's threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recorded(name: str, seed: int = 0) -> dict[str, Any]:
    """A frame of the robot's with random pictures, and actions that do not change within the chunk."""
    item, rng = frame(name, seed), np.random.default_rng(seed)
    item["action"] = np.repeat(item["action"][:1], 5, axis=0)
    return item | {k: rng.integers(0, 256, (9, 11, 3)).astype(np.uint8) for k in item if "images" in k}


@functools.cache
def stats(name: str) -> dict[str, NormStats]:
    robot = make_robot(CASES[name].reference)
    delta = DeltaActions(robot.delta_mask or ())
    frames = [delta(robot.numbers(recorded(name, seed))) for seed in range(40)]
    return {
        "state": NormStats.from_data(np.stack([f["state"] for f in frames])),
        "actions": NormStats.from_data(np.concatenate([f["actions"] for f in frames])),
    }


@pytest.fixture(scope="module")
def fast(tmp_path_factory) -> FASTTokenizer:
    """An action tokenizer fitted on all robots' actions."""
    chunks = []
    for name in CASES:
        robot = make_robot(CASES[name].reference)
        for seed in range(40):
            data = DeltaActions(robot.delta_mask or ())(robot.numbers(recorded(name, seed)))
            chunks.append(Normalize(stats(name), "quantile")(data)["actions"])
    tokenizer = FASTTokenizer.fit(chunks, vocab_size=FAST_SIZE)
    tokenizer.save(tmp_path_factory.mktemp("fast") / "tokenizer")
    return tokenizer


@pytest.fixture(scope="module")
def assets_of(fast: FASTTokenizer):
    def make(kind: str, name: str) -> Assets:
        return Assets(
            CONFIGS[kind],
            stats(name),
            asset_id=name,
            normalization=FAMILIES[kind].normalization,
            tokenizer=TextTokenizer(BUNDLED).reference(),
            robot=CASES[name].reference,
            action_tokenizer=fast.reference() if kind == "pi0_fast" else None,
        )

    return make


def taught(rows: list[dict[str, Any]], steps: int = 200) -> Checkpoint:
    """A π0-FAST that knows these examples by heart, so that what it writes is actions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    checkpoint = random_checkpoint(CONFIGS["pi0_fast"])
    model = load_torch(checkpoint)
    data = {key: np.stack([row[key] for row in rows]) for key in rows[0] if key != "actions"}
    observation = pi0_torch.to_device(Observation.from_dict(data, model.config))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.compute_loss(observation).mean()
        loss.backward()
        optimizer.step()
        if loss < 0.05:
            break
    assert loss < 0.05
    torch.set_num_threads(threads)
    ours = LAYOUTS["pi0_torch"].to_ours(model.config, parameters_of(model.state_dict()))
    return dataclasses.replace(checkpoint, ours=ours)


@pytest.fixture(scope="module")
def checkpoints(assets_of) -> dict[str, Checkpoint]:
    """One model of each kind, in memory."""
    rows = [Pipeline.from_assets(assets_of("pi0_fast", name))(recorded(name)) for name in TAUGHT]
    return {kind: random_checkpoint(CONFIGS[kind]) for kind in ("pi0", "pi05")} | {"pi0_fast": taught(rows)}


@pytest.fixture(scope="module")
def models(checkpoints) -> dict[tuple[str, str], Any]:
    loaders = {"jax": load_jax, "torch": load_torch}
    return {(kind, name): load(c) for kind, c in checkpoints.items() for name, load in loaders.items()}


@pytest.fixture(scope="module")
def policy_of(models, assets_of):
    def make(kind: str, framework: str, name: str = "metaworld", **options: Any) -> pi0_jax.Policy | pi0_torch.Policy:
        return FRAMEWORKS[framework](models[kind, framework], assets_of(kind, name), **options)

    return make


def noise(seed: int = 0, batch: int | None = None) -> np.ndarray:
    shape = (5, 16) if batch is None else (batch, 5, 16)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_equal(a: np.ndarray, b: np.ndarray) -> None:
    """To 3e-6, relative L2: float32 rounding, as the sampled actions of the bare models (see test_parity)."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.float32
    assert np.linalg.norm(a - b) <= 3e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_both_frameworks_act_alike(kind: str, name: str, policy_of):
    """In robot units, for every robot; π0-FAST writes what it learnt, and both read it the same."""
    item, options = recorded(name), {} if kind == "pi0_fast" else {"noise": noise()}
    a, b = (policy_of(kind, framework, name, fallback=True).infer(item, **options) for framework in FRAMEWORKS)
    assert a["actions"].shape == (5, CASES[name].dims[2]) and np.isfinite(a["actions"]).all()
    assert_equal(a["actions"], b["actions"])
    assert all(result["timing"].keys() == {"inputs", "model", "actions"} for result in (a, b))
    if kind == "pi0_fast":
        assert a["decoded"] == b["decoded"]
    if kind == "pi0_fast" and name in TAUGHT:
        assert a["decoded"]
        # The one coefficient of each dimension is rounded by 0.05 at most, which is 0.05 / sqrt(5) of each action, in
        # units of half a range of at most 2.
        np.testing.assert_allclose(a["actions"], item["action"], atol=0.0224)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_text_that_is_no_actions(framework: str, policy_of, monkeypatch):
    """It raises; or, where that is asked for, is said to have been replaced by the middle of what training saw."""
    policy, item = policy_of("pi0_fast", framework), recorded("metaworld")
    sample = policy.sample
    monkeypatch.setattr(policy, "sample", lambda *args: sample(*args)[:, :-18])  # cut short, in the middle of them
    with pytest.raises(FASTError):
        policy.infer(item)
    policy.fallback = True
    result = policy.infer_batch([item])
    assert not result["decoded"].any()
    low, high = stats("metaworld")["actions"].q01, stats("metaworld")["actions"].q99
    np.testing.assert_allclose(result["actions"], np.broadcast_to((low + high) / 2, (1, 5, 4)), atol=1e-6)  # float32


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_batch_is_its_frames(kind: str, framework: str, policy_of):
    policy, items = policy_of(kind, framework), [recorded("metaworld", seed) for seed in (0, 1, 2)]
    policy.fallback = True
    draws = [None] * 3 if kind == "pi0_fast" else noise(batch=3)
    together = policy.infer_batch(items, None if kind == "pi0_fast" else draws)
    assert together["actions"].shape == (3, 5, 4)
    for i, (item, draw) in enumerate(zip(items, draws, strict=True)):
        assert_equal(together["actions"][i], policy.infer(item, draw)["actions"])


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_what_training_sees(kind: str, framework: str, policy_of):
    """A recorded frame goes the way of the training pipeline, and its recorded actions change nothing."""
    policy, item = policy_of(kind, framework), LeRobotDataset(METAWORLD, action_horizon=5, episodes=[0])[10]
    row = policy.pipeline(item)
    del row["actions"]
    expected = Observation.from_dict({key: np.asarray(value)[None] for key, value in row.items()}, policy.config)
    inputs = policy.inputs([item])
    assert jax.tree.structure(expected) == jax.tree.structure(inputs)
    jax.tree.map(np.testing.assert_array_equal, expected, inputs)
    (chunk,) = policy.sample(expected, noise(batch=1))
    np.testing.assert_array_equal(policy.infer(item, noise())["actions"], policy.pipeline.actions(chunk, row["state"]))
    live = {"corner": item["observation.images.corner"], "wrist": item["observation.images.wrist"]}
    live |= {"state": item["observation.state"], "prompt": item["task"]}
    jax.tree.map(np.testing.assert_array_equal, expected, policy.inputs([live]))


def test_pi0_fast_asks_what_training_asks(policy_of):
    policy, item = policy_of("pi0_fast", "torch"), recorded("metaworld")
    row = policy.pipeline(item)
    question = row["tokenized_prompt"][row["tokenized_prompt_mask"] & ~row["token_loss_mask"]]
    inputs = policy.inputs([item])
    np.testing.assert_array_equal(inputs.tokenized_prompt[0][inputs.tokenized_prompt_mask[0]], question)


def test_the_same_seed_draws_the_same_noise(policy_of):
    item = recorded("metaworld")
    results = []
    for framework in FRAMEWORKS:
        policy = policy_of("pi0", framework, seed=3)
        results.append([policy.infer(item)["actions"] for _ in range(2)])
    (a, a_next), (b, b_next) = results
    assert_equal(a, b)
    assert_equal(a_next, b_next)
    assert not np.allclose(a, a_next, atol=1e-3)


def changed(**values: Any) -> dict[str, Any]:
    """A Meta-World frame with other values; without those that are None."""
    names = {"corner": "observation.images.corner", "state": "observation.state", "task": "task"}
    item = recorded("metaworld") | {names[key]: value for key, value in values.items()}
    return {key: value for key, value in item.items() if value is not None}


@pytest.mark.parametrize(
    ("observation", "named"),
    [
        (changed(corner=None), "corner"),
        (changed(corner=np.zeros((9, 11), np.uint8)), r"images\.corner.*\[9, 11\]"),
        (changed(corner=np.zeros((9, 11, 3), np.int32)), r"images\.corner.*int32"),
        (changed(corner=np.zeros((0, 11, 3), np.uint8)), r"images\.corner.*\[0, 11, 3\]"),
        (changed(state=None), "state"),
        (changed(state=np.array([0, 1, np.nan, 0])), r"observation\.state is nan at \[2\]"),
        (changed(state=np.zeros(5)), r"state is \[5\]; expected \[4\]"),
        (changed(state=["a", "b", "c", "d"]), r"observation\.state is not an array of numbers"),
        (changed(task=None), "prompt"),
        (changed(task=7), "task is 7"),
        ("go", "expected a dict of images"),
    ],
)
def test_bad_observations_never_reach_the_model(observation: Any, named: str, policy_of, monkeypatch):
    policy = policy_of("pi0", "torch")
    monkeypatch.setattr(policy, "sample", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ObservationError, match=named):
        policy.infer(observation)
    with pytest.raises(ObservationError, match=f"observation 1: .*({named})"):
        policy.infer_batch([recorded("metaworld"), observation])


@pytest.mark.parametrize(
    ("kind", "draw", "named"),
    [("pi0", np.zeros((5, 4), np.float32), r"noise: shape \[1, 5, 4\]"), ("pi0_fast", noise(), "takes none")],
)
def test_bad_noise(kind: str, draw: np.ndarray, named: str, policy_of):
    with pytest.raises(ObservationError, match=named):
        policy_of(kind, "torch").infer(recorded("metaworld"), draw)


def test_no_frames(policy_of):
    for nothing in ([], recorded("metaworld")):
        with pytest.raises(ObservationError, match="list of observations, not empty"):
            policy_of("pi0", "torch").infer_batch(nothing)


# ---- from what lies in a folder


@pytest.fixture(scope="module")
def folders(checkpoints, assets_of, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each kind as training leaves it."""
    root, folders = tmp_path_factory.mktemp("checkpoints"), {}
    for kind, checkpoint in checkpoints.items():
        whole = dataclasses.replace(checkpoint, assets=assets_of(kind, "metaworld"))
        folders[kind] = write(whole, root / kind, "pi0_jax")
    return folders


PAIRS = [(kind, layout) for layout in WRITABLE for kind in CONFIGS if kind in LAYOUTS[layout].kinds]


@pytest.mark.parametrize(("kind", "layout"), PAIRS)
def test_from_every_layout(kind: str, layout: str, folders, policy_of, tmp_path):
    """What pi0-convert writes needs nothing else."""
    folder = convert(folders[kind], tmp_path / layout, to=layout).folder
    options = {} if kind == "pi0_fast" else {"noise": noise()}
    item = recorded("metaworld")
    expected = policy_of(kind, "torch").infer(item, **options)["actions"]
    for policy in FRAMEWORKS.values():
        assert_equal(policy.from_pretrained(folder).infer(item, **options)["actions"], expected)


@pytest.mark.parametrize("kind", ["pi0", "pi0_fast"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_fast_policies_act_alike(framework: str, kind: str, folders, policy_of):
    """By the samplers laid out for speed."""
    policy = FRAMEWORKS[framework].from_pretrained(folders[kind], use_sampler=True)
    item, options = recorded("metaworld"), {} if kind == "pi0_fast" else {"noise": noise()}
    expected = policy_of(kind, framework).infer(item, **options)["actions"]
    assert policy.model is None  # whose later changes the sampler would not see
    assert_equal(policy.infer(item, **options)["actions"], expected)
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert_equal(other.infer(item, **options)["actions"], expected)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_noise_of_any_framework(framework: str, policy_of):
    policy, item = policy_of("pi0", framework), recorded("metaworld")
    given = torch.from_numpy(noise()).bfloat16()
    expected = policy.infer(item, given.float().numpy())["actions"]
    for same in (given, given.clone().requires_grad_(), jnp.asarray(given.float().numpy(), jnp.bfloat16)):
        np.testing.assert_array_equal(policy.infer(item, same)["actions"], expected)


@pytest.mark.parametrize("kind", ["pi0", "pi0_fast"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_copies_of_a_policy_are_independent(framework: str, kind: str, folders):
    policy = FRAMEWORKS[framework].from_pretrained(folders[kind], seed=3)
    copies, item = [copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))], recorded("metaworld")
    chunks = [[each.infer(item)["actions"] for _ in range(2)] for each in (policy, *copies)]
    for own in chunks[1:]:  # each draws its own noise, from the same state
        np.testing.assert_array_equal(own, chunks[0])


@pytest.mark.parametrize("layout", ["openpi_jax", "lerobot"])
def test_checkpoints_of_others_need_the_robot(layout: str, folders, policy_of, tmp_path):
    """openpi's have norm stats and do not say the robot; LeRobot's have processors, of any robot's features."""
    folder = convert(folders["pi05"], tmp_path / layout, to=layout).folder
    (folder / "assets" / "config.json").unlink()
    (folder / "checksums.json").unlink()  # ours, too
    if layout == "lerobot":
        shutil.rmtree(folder / "assets")
    said = {"config": CONFIGS["pi05"], "tokenizer": BUNDLED}
    if layout == "openpi_jax":
        with pytest.raises(AssetsError, match=r"robot=, one of aloha"):
            pi0_torch.Policy.from_pretrained(folder, **said)
    else:
        assert pi0_torch.Policy.from_pretrained(folder, **said).pipeline.robot.action_dim == 4
    item = recorded("metaworld")
    expected = policy_of("pi05", "torch").infer(item, noise())["actions"]
    policy = pi0_torch.Policy.from_pretrained(folder, **said, robot="metaworld")
    found = policy.infer(item, noise())["actions"]
    # LeRobot keeps norm stats in float32: a last place of 1.2e-7, in stats and in what they scale
    np.testing.assert_allclose(found, expected, atol=3e-6)


def test_what_the_caller_says(folders, policy_of, tmp_path):
    item = recorded("metaworld")
    del item["task"]
    policy = pi0_torch.Policy.from_pretrained(
        folders["pi0"], default_prompt="fold the towel", num_steps=2, dtype="bfloat16", param_dtype="bfloat16"
    )
    assert policy.model.config.runtime.dtype == "bfloat16" and {p.dtype for p in policy.model.parameters()} == {
        torch.bfloat16
    }
    inputs, expected = policy.inputs([item]), policy_of("pi0", "torch").inputs([recorded("metaworld")])
    np.testing.assert_array_equal(inputs.tokenized_prompt, expected.tokenized_prompt)

    plain = pi0_torch.Policy.from_pretrained(folders["pi0"], num_steps=2).infer(recorded("metaworld"), noise())
    double = {key: dataclasses.replace(s, mean=2 * s.mean, std=2 * s.std) for key, s in stats("metaworld").items()}
    double["state"] = stats("metaworld")["state"]
    save_norm_stats(tmp_path / "norm_stats.json", double)
    for given in (double, tmp_path / "norm_stats.json"):
        policy = pi0_torch.Policy.from_pretrained(folders["pi0"], norm_stats=given, num_steps=2)
        np.testing.assert_allclose(policy.infer(recorded("metaworld"), noise())["actions"], 2 * plain["actions"], 1e-4)
    with pytest.raises(ValueError, match="num_steps is 0"):
        pi0_torch.Policy.from_pretrained(folders["pi0"], num_steps=0)


def test_which_norm_stats(folders, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(folders["pi0"], folder)
    shutil.copytree(folder / "assets" / "metaworld", folder / "assets" / "other")
    (folder / "assets" / "config.json").unlink()
    said = {"config": CONFIGS["pi0"], "tokenizer": BUNDLED, "robot": "metaworld"}
    with pytest.raises(AssetsError, match=r"asset_id=, one of metaworld, other"):
        pi0_torch.Policy.from_pretrained(folder, **said)
    assert pi0_torch.Policy.from_pretrained(folder, **said, asset_id="other").assets.asset_id == "other"


@pytest.mark.parametrize("name", CASES)
def test_a_previous_chunk_is_read_as_recorded_actions_are(name: str, policy_of):
    """In the robot's units; relative ones are relative to the new state; what is missing or padding weighs 0."""
    policy, item = policy_of("pi0", "torch", name, rtc="guided"), recorded(name)
    recorded_actions = item.pop("action")
    actions, weights = policy.previous([item | {"prev_chunk": recorded_actions[:3], "delay": 1}])
    expected = policy.pipeline(item | {"action": recorded_actions})["actions"][:3]
    np.testing.assert_array_equal(actions[0, :3], expected)
    dims = policy.pipeline.robot.action_dim
    np.testing.assert_allclose(weights[0, :, 0], policy.rtc.weights(5, 1, 3))
    assert (weights[0, :3, :dims] > 0).all() and not weights[0, 3:].any() and not weights[0, :, dims:].any()


@pytest.mark.parametrize("use_sampler", [False, True])
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_both_frameworks_go_on_from_a_chunk_alike(kind: str, use_sampler: bool, policy_of, models):
    item, found = recorded("metaworld"), {}
    previous = {"prev_chunk": item["action"][1:4], "delay": 2}
    for framework, module in (("jax", pi0_jax.sampler), ("torch", pi0_torch.sampler)):
        sampler = module.Sampler(models[kind, framework], rtc="guided", warm_up=False) if use_sampler else None
        policy = policy_of(kind, framework, rtc="guided", sampler=sampler)
        found[framework] = policy.infer(item | previous, noise=noise())["actions"]
        assert np.abs(found[framework] - policy.infer(item, noise=noise())["actions"]).max() > 0.01
    assert_equal(found["jax"], found["torch"])


@pytest.mark.parametrize(
    ("previous", "named"),
    [
        ({"prev_chunk": np.zeros((6, 4))}, "expected 1 to 5 actions"),
        ({"prev_chunk": np.zeros((0, 4))}, "expected 1 to 5 actions"),
        ({"prev_chunk": np.zeros((2, 5))}, r"expected \[T, 4\]"),
        ({"prev_chunk": np.full((2, 4), np.nan)}, "expected finite numbers"),
        ({"prev_chunk": np.zeros((2, 4)), "delay": 3}, "delay is 3; it must be from 0 to the 2 actions"),
        ({"prev_chunk": np.zeros((2, 4)), "delay": 1.5}, "delay is 1.5"),
        ({"delay": 1}, "it is missing"),
    ],
)
def test_previous_chunks_that_do_not_fit(previous: dict[str, Any], named: str, policy_of):
    with pytest.raises(ObservationError, match=f"prev_chunk: .*{named}"):
        policy_of("pi0", "torch", rtc="guided").infer(recorded("metaworld") | previous)


def test_real_time_chunking_that_cannot_be(policy_of, caplog: pytest.LogCaptureFixture):
    item = recorded("metaworld")
    with pytest.raises(ObservationError, match="prev_chunk: this policy has no real-time chunking"):
        policy_of("pi0", "torch").infer(item | {"prev_chunk": item["action"]})
    with pytest.raises(AssetsError, match=r"was not trained with config\.rtc"):
        policy_of("pi0", "torch", rtc="trained")
    with pytest.raises(AssetsError, match="real-time chunking is for flow matching"):
        policy_of("pi0_fast", "torch", rtc="guided")
    policy = policy_of("pi0", "torch")
    assets = dataclasses.replace(policy.assets, training={"rtc": {"max_delay": 1, "distribution": "uniform"}})
    trained = pi0_torch.Policy(policy.model, assets, rtc="trained")
    for _ in range(2):
        trained.infer(item | {"prev_chunk": item["action"], "delay": 2})
    assert caplog.text.count("delay is 2; the model was trained for at most 1") == 1
