"""Policies that LeRobot 0.6.1 wrote, and the actions it gave: `tests/golden_lerobot` (see its README)."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.checkpoints import Checkpoint, open_checkpoint, write_checkpoint
from convert.conversion import convert, verify_equal
from convert.formats.safetensors import read_safetensors, write_safetensors
from convert.inspection import inspect
from convert.lerobot import read_lerobot_assets, read_lerobot_model
from convert.peft import merge_adapter
from convert.tensors import CheckpointError, Tensor
from pi0.parameters import LayoutError
from pi0.robots.normalize import NormStats
from pi0.tokenizers.fast import FASTTokenizer
from tests.convert.test_checkpoints import random_checkpoint, write

GOLDEN = Path(__file__).parents[1] / "golden_lerobot"
POLICIES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
HEAD_DIMS = (16, 16)  # which no file of LeRobot's says
TOLERANCE = 3e-5  # relative L2; LeRobot's own rounding allows 2e-5
TEXT = "model.paligemma_with_expert.paligemma"


@pytest.fixture
def policy(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a policy's folder. In git, weights that are the same are links."""
    return lambda name: Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def edit(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))


def step(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next(s for s in values["steps"] if s["registry_name"] == name)


def frames(expected: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    names = [name for name in expected if name not in ("actions", "noise", "prompt")]
    prompts = [str(prompt) for prompt in expected["prompt"]]
    return [{name: expected[name][i] for name in names} | {"prompt": p} for i, p in enumerate(prompts)]


def exact_policy(framework: str, folder: Path, **options: Any) -> Any:
    """A policy of a golden folder, float32 as LeRobot's config says."""
    cls = importlib.import_module(framework).Policy
    return cls.from_pretrained(folder, tokenizer=GOLDEN / "tokenizer.model", **{"head_dims": HEAD_DIMS} | options)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.usefixtures("highest_precision")
@pytest.mark.parametrize("framework", ["pi0_jax", "pi0_torch"])
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "pi0_fast"])
def test_actions_are_lerobots(name: str, framework: str, policy):
    """By what its files say: cameras, dimensions, normalization, relative actions, periods, prompt."""
    expected = dict(np.load(GOLDEN / name / "expected.npz"))
    found = exact_policy(framework, policy(name)).infer_batch(frames(expected), expected["noise"])["actions"]
    assert found.shape == expected["actions"].shape
    assert relative(found, expected["actions"]) < TOLERANCE


@pytest.mark.usefixtures("highest_precision")
@pytest.mark.parametrize("use_sampler", [False, True])
@pytest.mark.parametrize("framework", ["pi0_jax", "pi0_torch"])
def test_tokens_are_lerobots(framework: str, use_sampler: bool, policy, tmp_path: Path):
    expected, folder = np.load(GOLDEN / "pi0_fast" / "expected.npz"), policy("pi0_fast")
    chunks = [np.random.default_rng(seed).normal(size=(6, 7)) for seed in range(4)]
    FASTTokenizer.fit(chunks, vocab_size=256).save(tmp_path / "fast")
    options = {"use_sampler": use_sampler, "num_steps": expected["written_tokens"].shape[1]}
    model = exact_policy(framework, folder, action_tokenizer=str(tmp_path / "fast"), **options)
    names = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb", "state")
    observation = model.inputs([{n: expected[n] for n in names} | {"prompt": str(p)} for p in expected["prompt"]])
    for row, mask, tokens in zip(
        observation.tokenized_prompt, expected["prompt_mask"], expected["prompt_tokens"], strict=True
    ):
        length = int(mask.sum())
        np.testing.assert_array_equal(row[:length], tokens[:length])
        assert row[length] == 2 and not row[length + 1 :].any()  # <bos>
    np.testing.assert_array_equal(model.sample(observation, None), expected["written_tokens"])


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_converts_to_every_layout_that_can_hold_it_and_back(name: str, policy, tmp_path: Path):
    folder = policy(name)
    source = open_checkpoint(folder, head_dims=HEAD_DIMS)
    other = {"pi0_periods": "periods", "pi0_fast": "cannot hold pi0_fast"}
    for layout in ("pi0_jax", "pi0_torch", "lerobot", "openpi_jax", "openpi_torch"):
        refused = other.get(name) if layout.startswith("openpi") else None
        if refused is not None and (name, layout) != ("pi0_fast", "openpi_jax"):
            with pytest.raises(LayoutError, match=refused):
                convert(folder, tmp_path / layout, to=layout, head_dims=HEAD_DIMS)
            continue
        there = convert(folder, tmp_path / layout, to=layout, head_dims=HEAD_DIMS)
        back = convert(tmp_path / layout, tmp_path / f"back_{layout}", to="lerobot")
        for converted in (there, back):
            assert converted.assets.model == source.assets.model
            assert converted.assets.normalization == source.assets.normalization
            assert converted.assets.robot == source.assets.robot
            verify_equal(source, converted)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "pi0_fast"])
def test_what_we_write_is_read_back_from_lerobots_files_alone(name: str, policy, tmp_path: Path):
    source = convert(policy(name), tmp_path / "out", to="lerobot", head_dims=HEAD_DIMS)
    shutil.rmtree(tmp_path / "out" / "assets")
    (tmp_path / "out" / "checksums.json").unlink(missing_ok=True)
    back = open_checkpoint(tmp_path / "out", head_dims=HEAD_DIMS)
    verify_equal(source, back)
    assert back.assets.model == source.assets.model
    for field in ("normalization", "robot", "tokenizer"):
        assert getattr(back.assets, field) == getattr(source.assets, field), field
    expected = dict(np.load(GOLDEN / name / "expected.npz"))
    found = exact_policy("pi0_torch", tmp_path / "out").infer_batch(frames(expected), expected["noise"])["actions"]
    assert relative(found, expected["actions"]) < TOLERANCE


@pytest.mark.usefixtures("highest_precision")
def test_an_output_projection_of_its_own_counts_in_pi0_fast(policy, tmp_path: Path):
    """It writes other tokens; openpi's layout has no place for it."""
    folder = policy("pi0_fast")
    assert open_checkpoint(folder, head_dims=HEAD_DIMS).assets.model.tied_output
    tensors = {
        name: Tensor.of(np.array(t.read(()))) for name, t in read_safetensors(folder / "model.safetensors").items()
    }
    head = tensors[f"{TEXT}.lm_head.weight"].read(())
    tensors[f"{TEXT}.model.language_model.embed_tokens.weight"] = Tensor.of(head)
    write_safetensors(folder / "model.safetensors", tensors)
    assert open_checkpoint(folder, head_dims=HEAD_DIMS).assets.model.tied_output  # equal
    tensors[f"{TEXT}.lm_head.weight"] = Tensor.of(head[::-1].copy())
    write_safetensors(folder / "model.safetensors", tensors)
    source = open_checkpoint(folder, head_dims=HEAD_DIMS)
    assert not source.assets.model.tied_output and "both are kept" in source.notes[0]
    np.testing.assert_array_equal(source.ours["paligemma.output"].read(()), head[::-1])
    np.testing.assert_array_equal(source.ours["paligemma.embedding"].read(()), head)
    with pytest.raises(LayoutError, match="openpi_jax has one tensor for the text embedding and the output projection"):
        convert(folder, tmp_path / "openpi", to="openpi_jax", head_dims=HEAD_DIMS)
    for layout in ("pi0_jax", "pi0_torch", "lerobot"):
        verify_equal(source, convert(folder, tmp_path / layout, to=layout, head_dims=HEAD_DIMS))
    expected = np.load(GOLDEN / "pi0_fast" / "expected.npz")
    tokens = []
    for framework, layout in (("pi0_jax", "pi0_torch"), ("pi0_torch", "pi0_jax")):
        module = importlib.import_module(framework)
        model = module.load(tmp_path / layout)
        names = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
        rows = len(expected["prompt_tokens"])
        text = {"tokenized_prompt": expected["prompt_tokens"], "tokenized_prompt_mask": expected["prompt_mask"]}
        text = {key: np.pad(value, ((0, 0), (0, model.config.max_token_len - 60))) for key, value in text.items()}
        state = np.zeros((rows, model.config.state_size), np.float32)
        images = {f"image/{n}": np.stack([expected[n]] * rows) for n in names}
        observation = module.Observation.from_dict(images | text | {"state": state}, model.config)
        sampler = module.Sampler(model, num_steps=8)
        tokens.append(np.asarray(sampler.sample(observation)))
        if framework == "pi0_torch":
            from pi0_torch.loading import to_device

            observation = to_device(observation)
        np.testing.assert_array_equal(np.asarray(model.sample(observation, None, 8)), tokens[-1])
    np.testing.assert_array_equal(*tokens)
    assert tokens[0].tolist() != expected["written_tokens"][:, :8].tolist()


def test_the_unused_output_projection_of_pi0_is_named(policy):
    checkpoint = open_checkpoint(policy("pi0_trained"), head_dims=HEAD_DIMS)
    assert checkpoint.notes == [f"{TEXT}.lm_head.weight is not used: π0 writes no text in LeRobot"]
    assert inspect(policy("pi0_base"), head_dims=HEAD_DIMS).notes == checkpoint.notes


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda v: v.update(n_obs_steps=2), "n_obs_steps is 2; only 1 is supported"),
        ("config.json", lambda v: v.update(use_amp=True), "use_amp is True"),
        ("config.json", lambda v: v.update(rtc_config={"enabled": True}), "rtc_config is .*set it to null"),
        ("config.json", lambda v: v.update(memory_tokens=4), "memory_tokens is 4; this setting is unknown"),
        ("config.json", lambda v: v.update(use_relative_actions=True), "enabled is False; in config.json it is True"),
        (
            "policy_preprocessor.json",
            lambda v: v["steps"].insert(2, {"registry_name": "my_crop_processor", "config": {}}),
            "the step 'my_crop_processor', which is unknown",
        ),
        (
            "policy_preprocessor.json",
            lambda v: v["steps"].pop(2),
            r"has the steps .*in this order",
        ),
        (
            "policy_preprocessor.json",
            lambda v: step(v, "tokenizer_processor")["config"].update(padding_side="left"),
            "tokenizer_processor.padding_side is 'left'; only 'right' is supported",
        ),
        (
            "policy_preprocessor.json",
            lambda v: step(v, "device_processor")["config"].update(float_dtype="bfloat16"),
            "device_processor.float_dtype is 'bfloat16'",
        ),
        (
            "policy_preprocessor.json",
            lambda v: step(v, "normalizer_processor")["config"]["norm_map"].update(VISUAL="MEAN_STD"),
            "norm_map.VISUAL is 'MEAN_STD'",
        ),
        (
            "policy_preprocessor.json",
            lambda v: step(v, "rename_observations_processor")["config"]["rename_map"].update(
                {"observation.joints": "observation.state"}
            ),
            "rename_map.*only cameras can be renamed",
        ),
        (
            "policy_preprocessor.json",
            lambda v: step(v, "relative_actions_processor")["config"].update(enabled=True),
            "enabled is False; in policy_preprocessor.json it is True: one must undo the other",
        ),
        (
            "policy_postprocessor.json",
            lambda v: step(v, "unnormalizer_processor")["config"].update(eps=1e-3),
            "eps is 0.001; in policy_preprocessor.json it is 1e-08",
        ),
        (
            "policy_postprocessor.json",
            lambda v: step(v, "unnormalizer_processor")["config"]["norm_map"].update(ACTION="MIN_MAX"),
            "norm_map.ACTION is 'MIN_MAX'",
        ),
    ],
)
def test_a_setting_that_is_not_supported_is_refused_by_its_name(file: str, change, message: str, policy):
    folder = policy("pi0_base")
    edit(folder, file, change)
    with pytest.raises(LayoutError, match=message):
        open_checkpoint(folder, head_dims=HEAD_DIMS)
    (problem,) = inspect(folder, head_dims=HEAD_DIMS).problems  # and pi0-inspect says so
    assert file in problem or "policy_p" in problem


def test_other_stats_in_the_postprocessor_are_refused(policy):
    folder = policy("pi0_base")
    (file,) = folder.glob("policy_postprocessor*.safetensors")
    tensors = {name: Tensor.of(np.array(t.read(()))) for name, t in read_safetensors(file).items()}
    write_safetensors(file, tensors | {"action.std": Tensor.of(tensors["action.std"].read(()) * 2)})
    with pytest.raises(LayoutError, match=r"the stats std of action are not those of policy_preprocessor.json"):
        open_checkpoint(folder, head_dims=HEAD_DIMS)


def test_cameras_that_the_model_lacks_are_refused(policy):
    folder = policy("pi0_base")
    model = open_checkpoint(folder, head_dims=HEAD_DIMS).assets.model
    with pytest.raises(LayoutError, match=r"input_features is .*; the model has 1 cameras"):
        read_lerobot_assets(folder, dataclasses.replace(model, image_keys=model.image_keys[:1]))


def test_inert_settings_change_nothing(policy):
    folder = policy("pi0_base")
    before = open_checkpoint(folder, head_dims=HEAD_DIMS)
    edit(
        folder, "config.json", lambda v: v.update(optimizer_lr=1.0, device="cuda", compile_model=True, n_action_steps=2)
    )
    after = open_checkpoint(folder, head_dims=HEAD_DIMS)
    assert after.assets.model == before.assets.model
    assert "n_action_steps 2 of 6: the whole chunk is returned here" in after.notes


def test_each_feature_has_its_own_normalization(policy):
    folder = policy("pi05_base")
    for name, kind in (
        ("policy_preprocessor.json", "normalizer_processor"),
        ("policy_postprocessor.json", "unnormalizer_processor"),
    ):
        edit(
            folder,
            name,
            lambda v, kind=kind: step(v, kind)["config"]["norm_map"].update(STATE="QUANTILE10", ACTION="MIN_MAX"),
        )
    assets = open_checkpoint(folder, head_dims=HEAD_DIMS).assets
    assert assets.normalization == {"state": "quantile10", "actions": "min_max", "eps": 1e-8}
    state, actions = (assets.norm_stats[key] for key in ("state", "actions"))
    x = np.linspace(-2, 2, 7)
    np.testing.assert_allclose(state.apply(x, "quantile10"), 2 * (x - state.q10) / (state.q90 - state.q10) - 1)
    np.testing.assert_allclose(actions.invert(x, "min_max"), (x + 1) / 2 * (actions.max - actions.min) + actions.min)


def test_lerobots_epsilon():
    """MEAN_STD adds it to the divisor alone; ranges of zero are replaced by it."""
    stats = NormStats(np.zeros(2), np.array([0.0, 1.0]), *[np.array([1.0, 0.0]), np.array([1.0, 2.0])] * 2)
    x = np.array([1.0, 1.0])
    np.testing.assert_allclose(stats.apply(x, "mean_std", 0.5), x / ([0.5, 1.5]))
    np.testing.assert_allclose(stats.invert(x, "mean_std", 0.5), [0.0, 1.0])
    np.testing.assert_allclose(stats.invert(stats.apply(x, "mean_std", 0.5), "mean_std", 0.5, exact=True), x)
    for mode in ("quantiles", "min_max"):
        np.testing.assert_allclose(stats.apply(np.array([1.5, 1.0]), mode, 0.5), [1.0, 0.0])
        np.testing.assert_allclose(stats.invert(np.array([1.0, 0.0]), mode, 0.5), [1.5, 1.0])
    np.testing.assert_array_equal(stats.apply(x, "identity"), x)


def test_folders_of_a_training_run(policy, tmp_path: Path):
    """`checkpoints/020000/pretrained_model`, and `last`, a link to the newest."""
    run = tmp_path / "run"
    for name in ("010000", "020000"):
        folder = run / "checkpoints" / name
        shutil.copytree(GOLDEN / "pi0_base", folder / "pretrained_model")
        (folder / "training_state").mkdir()
        (folder / "training_state" / "training_step.json").write_text(json.dumps({"step": int(name)}))
    (run / "checkpoints" / "last").symlink_to("020000")
    for source, options, wanted in (
        (run, {}, 20000),
        (run, {"step": 10000}, 10000),
        (run / "checkpoints" / "last", {}, 20000),
        (run / "checkpoints" / "010000" / "pretrained_model", {}, 10000),
    ):
        assert open_checkpoint(source, head_dims=HEAD_DIMS, **options).assets.step == wanted


def test_norm_stats_among_the_weights_of_0_3(policy, tmp_path: Path):
    """Its tensors have the names of older transformers, and its config no variants."""
    folder, new = policy("pi0_base"), tmp_path / "old"
    new.mkdir()
    assets = open_checkpoint(folder, head_dims=HEAD_DIMS).assets
    tensors = {}
    for name, tensor in read_safetensors(folder / "model.safetensors").items():
        name = name.replace(".paligemma.model.language_model.", ".paligemma.language_model.model.")
        name = name.replace(".paligemma.lm_head.", ".paligemma.language_model.lm_head.")
        tensors[name.replace(".paligemma.model.", ".paligemma.")] = tensor
    buffers = {}
    for part, feature, key in (("inputs", "observation_state", "state"), ("targets", "action", "actions")):
        for field in ("mean", "std"):
            value = Tensor.of(getattr(assets.norm_stats[key], field).astype(np.float32))
            buffers[f"normalize_{part}.buffer_{feature}.{field}"] = value
    buffers |= {n.replace("normalize_targets", "unnormalize_outputs"): t for n, t in buffers.items() if "targets" in n}
    write_safetensors(new / "model.safetensors", tensors | buffers)
    values = json.loads((folder / "config.json").read_text())
    for name in ("paligemma_variant", "action_expert_variant", "dtype", "min_period", "max_period", "image_resolution"):
        del values[name]
    values |= {"resize_imgs_with_padding": [56, 56], "proj_width": 32, "num_steps": values.pop("num_inference_steps")}
    (new / "config.json").write_text(json.dumps(values | {"attention_implementation": "eager", "use_cache": True}))
    expected = dict(np.load(GOLDEN / "pi0_base" / "expected.npz"))
    found = exact_policy("pi0_torch", new).infer_batch(frames(expected), expected["noise"])["actions"]
    assert relative(found, expected["actions"]) < TOLERANCE
    write_safetensors(
        new / "model.safetensors",
        tensors | buffers | {"unnormalize_outputs.buffer_action.std": Tensor.of(np.ones(7, np.float32))},
    )
    with pytest.raises(LayoutError, match=r"unnormalize_outputs\.buffer_action\.std and another buffer"):
        open_checkpoint(new, head_dims=HEAD_DIMS)


def adapter(folder: Path, base: Path, **changes: Any) -> dict[str, np.ndarray]:
    """A PEFT adapter of LeRobot's default targets, and one whole tensor; returns the tensors it must give."""
    rng, stored, expected = np.random.default_rng(0), {}, {}
    tensors = read_safetensors(base / "model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base), "bias": "none"}
    config |= {"target_modules": ".*", "init_lora_weights": True, "inference_mode": True, "lora_dropout": 0.1} | changes
    folder.mkdir()
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "action_in_proj.weight")) and "vision" not in name:
            a, b = (rng.normal(size=s).astype(np.float32) for s in ((4, tensor.shape[1]), (tensor.shape[0], 4)))
            module = f"base_model.model.{name.removesuffix('.weight')}"
            stored |= {f"{module}.lora_A.weight": Tensor.of(a), f"{module}.lora_B.weight": Tensor.of(b)}
            expected[name] = tensor.read(()) + np.float32(scale) * (b @ a)
    name = "model.action_out_proj.weight"
    stored[f"base_model.model.{name}"] = Tensor.of(np.ones(tensors[name].shape, np.float32))
    expected[name] = stored[f"base_model.model.{name}"].read(())
    write_safetensors(folder / "adapter_model.safetensors", stored)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}])
def test_a_peft_adapter_is_merged_into_its_base(changes: dict, policy, tmp_path: Path):
    base = policy("pi0_base")
    expected = adapter(tmp_path / "adapter", base, **changes)
    for file in base.glob("*.json"):
        shutil.copy(file, tmp_path / "adapter")
    for file in base.glob("policy_*.safetensors"):
        shutil.copy(file, tmp_path / "adapter")
    merged, _ = merge_adapter(tmp_path / "adapter", read_safetensors(base / "model.safetensors"))
    for name, array in expected.items():
        np.testing.assert_allclose(merged[name].read(()), array, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(merged[name].read((slice(1, 3),)), merged[name].read(())[1:3])
        np.testing.assert_array_equal(merged[name].read((1,)), merged[name].read(())[1])
        np.testing.assert_array_equal(merged[name].read((1, slice(2, 4))), merged[name].read(())[1, 2:4])
    checkpoint = open_checkpoint(tmp_path / "adapter", head_dims=HEAD_DIMS)
    assert any(note.startswith("PEFT adapter of ") for note in checkpoint.notes)
    np.testing.assert_array_equal(checkpoint.ours["action_out_proj.kernel"].read(()), np.ones((32, 12)))
    assert checkpoint.assets.robot["name"] == "generic"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which is not supported: merge the adapter with PEFT"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"base_model_name_or_path": None}, "does not name its base"),
    ],
)
def test_other_adapters_are_refused(changes: dict, message: str, policy, tmp_path: Path):
    adapter(tmp_path / "adapter", policy("pi0_base"), **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "adapter", head_dims=HEAD_DIMS)


def test_a_robots_deltas_and_cameras_are_written_for_lerobot(tmp_path: Path):
    checkpoint = random_checkpoint()
    robot = {"name": "libero", "delta": True, "cameras": {"image": "base_0_rgb", "wrist": "left_wrist_0_rgb"}}
    stats = {key: NormStats(np.zeros(n), np.ones(n)) for key, n in (("state", 8), ("actions", 7))}
    model = dataclasses.replace(checkpoint.assets.model, state_dim=9)
    checkpoint = random_checkpoint_of(
        checkpoint, dataclasses.replace(checkpoint.assets, model=model, robot=robot, norm_stats=stats)
    )
    folder = write(checkpoint, tmp_path / "out", "lerobot")
    assets = read_lerobot_assets(folder, read_lerobot_model(folder, "pi0"))
    assert assets.robot["cameras"] == robot["cameras"]
    assert (assets.robot["delta"], assets.robot["delta_dims"]) == (True, [6])
    assert (assets.model.state_dim, assets.model.action_dim) == (9, 7)
    relative_step = step(json.loads((folder / "policy_preprocessor.json").read_text()), "relative_actions_processor")
    assert relative_step["config"]["action_names"][-2:] == ["relative_5", "absolute_6"]


def random_checkpoint_of(checkpoint: Checkpoint, assets: Any) -> Checkpoint:
    from pi0.parameters import parameters

    rng = np.random.default_rng(0)
    ours = {n: Tensor.of(rng.normal(size=p.shape).astype(np.float32)) for n, p in parameters(assets.model).items()}
    return dataclasses.replace(checkpoint, assets=assets, ours=ours)


def test_the_names_of_tokenizers_are_the_real_ones(tmp_path: Path):
    checkpoint = random_checkpoint()
    for source, name in (
        ("gs://big_vision/paligemma_tokenizer.model", "google/paligemma-3b-pt-224"),
        ("hf://my/tokenizer/tokenizer.model", "my/tokenizer"),
        ("bundled://tokenizer.model", "bundled://tokenizer.model"),
    ):
        tokenizer = {"kind": "sentencepiece", "source": source}
        assets = dataclasses.replace(checkpoint.assets, tokenizer=tokenizer)
        folder = tmp_path / name.replace("/", "_")
        folder.mkdir()
        write_checkpoint(dataclasses.replace(checkpoint, assets=assets), folder, "lerobot")
        written = step(json.loads((folder / "policy_preprocessor.json").read_text()), "tokenizer_processor")
        assert written["config"]["tokenizer_name"] == name
        assert read_lerobot_assets(folder, read_lerobot_model(folder, "pi0")).tokenizer["source"] == source
