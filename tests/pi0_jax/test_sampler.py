from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pi0_jax
from convert.parity import Inputs
from pi0.buckets import compact
from pi0.config import ModelConfig
from pi0_jax import executables
from pi0_jax.fast import Sampler, TokenSampler
from pi0_jax.loading import abstract_model, make_model
from tests.fast_case import BUCKETS, config, distance, observations, seen, varied

FLOAT32 = 3e-6  # relative L2 of actions: rounding through a whole model, as between the two frameworks
PLAIN = jax.jit(lambda model, observation, noise: model.sample_actions(observation, noise))


def random_model(model: ModelConfig) -> pi0_jax.Pi0:
    """No norm or gate is at its start, where leaving it out would not show."""
    made, rng = jax.jit(lambda: make_model(model, rngs=nnx.Rngs(0)))(), np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), made)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_the_same_actions(kind: str, highest_precision: None):
    model = random_model(config(kind))
    sampler = Sampler(model, text_buckets=BUCKETS, warm_up=False)
    for name, inputs in observations(model.config):
        actions = sampler.sample(inputs.observation, inputs.noise)
        assert actions.dtype == jnp.float32
        assert distance(actions, PLAIN(model, inputs.observation, inputs.noise)) <= FLOAT32, name


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_bfloat16_is_as_near_to_float32_as_the_plain_model(kind: str, highest_precision: None):
    """× 1.2 for another, equally good order of rounding; over 32 rows, so that chance evens out."""
    exact, model = random_model(config(kind)), random_model(config(kind, "bfloat16"))
    inputs = seen(model.config, 32, model.config.image_keys, 8, seed=0)
    expected = PLAIN(exact, inputs.observation, inputs.noise)
    plain = distance(PLAIN(model, inputs.observation, inputs.noise), expected)
    actions = Sampler(model, warm_up=False).sample(inputs.observation, inputs.noise)
    assert distance(actions, expected) <= 1.2 * plain


def test_arrays_on_a_device_do_too():
    model = random_model(config("pi0", depth=1, num_steps=1))
    inputs = seen(model.config, 2, model.config.image_keys[1:], 4, seed=0)
    sampler = Sampler(model, text_buckets=BUCKETS, warm_up=False)
    from_numpy = sampler.sample(inputs.observation, inputs.noise)
    np.testing.assert_array_equal(from_numpy, sampler.sample(*jax.device_put((inputs.observation, inputs.noise))))
    assert sampler.executables.compiled == 2  # the weights' layout, and one sampler


@pytest.mark.parametrize("batches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_nothing_compiles_after_warm_up(batches: int):
    model = random_model(config("pi0", depth=1, num_steps=1))
    sampler = Sampler(model, text_buckets=(4,), warm_up=False)
    sampler.warm_up(batches=range(1, batches + 1), cameras=(1, 2))
    made, compilations = sampler.executables.compiled, []
    assert made == 1 + batches * 2 * 2

    def listen(event: str, seconds: float, **_: object) -> None:
        if "compile" in event:
            compilations.append(event)

    calls = list(varied(model.config, 200, batches))
    jax.monitoring.register_event_duration_secs_listener(listen)
    for inputs in calls:
        sampler.sample(inputs.observation, inputs.noise)
    assert compilations == []
    assert sampler.executables.compiled == made
    jax.jit(lambda x: x + 0.12345)(1.0).block_until_ready()
    assert compilations, "the counter does not count"


def test_a_restart_loads_executables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = random_model(config("pi0", depth=1))
    inputs = seen(model.config, 1, model.config.image_keys, 8, seed=0)

    def restart(**options: object) -> tuple[int, np.ndarray]:
        sampler = Sampler(model, text_buckets=(), executables=tmp_path / "compiled", **options)
        actions = np.asarray(sampler.sample(inputs.observation, inputs.noise))
        return sampler.executables.compiled, actions

    compiled, actions = restart()
    assert compiled == 2
    files = sorted((tmp_path / "compiled").iterdir())
    assert len(files) == 2
    assert restart()[0] == 0
    np.testing.assert_array_equal(restart()[1], actions)

    damaged = bytearray(files[0].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    files[0].write_bytes(damaged)
    compiled, again = restart()
    assert compiled == 1
    np.testing.assert_array_equal(again, actions)
    assert restart()[0] == 0


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (executables, "_host_processor", lambda: "another machine"),
        (executables, "_sources", lambda: "edited"),
        (jax, "__version__", "0.0"),
    ],
)
def test_a_stale_executable_is_never_used(
    where: object, name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def made(about: str = "config") -> tuple[int, float]:
        programs = executables.Executables(tmp_path, about)
        result = programs.get("add", lambda x: x + 1, np.float32(2))(np.float32(2))
        return programs.compiled, float(result)

    assert made() == (1, 3)
    assert made() == (0, 3)
    assert made("another config") == (1, 3)
    with jax.default_matmul_precision("highest"):
        assert made() == (1, 3)
    monkeypatch.setattr(where, name, value)
    assert made() == (1, 3)
    assert made() == (0, 3)


def test_fast_tokens_of_a_cut_prompt(tmp_path: Path):
    """π0-FAST writes the same after a prompt that is cut to its bucket, over a shorter cache."""
    model = random_model(ModelConfig.variant("tiny_pi0_fast"))
    inputs = Inputs.random(model.config, batch=3).observation.prompt_only()
    mask = np.arange(model.config.max_token_len) < np.array([[5], [2], [4]])
    observation = dataclasses.replace(inputs, tokenized_prompt_mask=mask)
    assert compact(observation, model.config, BUCKETS).tokenized_prompt.shape == (3, 5)
    expected = jax.jit(lambda model, o: model.sample_tokens(o, 6, eos_token=-1))(model, observation)
    options = {"max_decoding_steps": 6, "text_buckets": BUCKETS, "eos_token": -1, "executables": tmp_path}
    for _ in "ab":  # made, then loaded
        sampler = TokenSampler(model, **options)
        np.testing.assert_array_equal(sampler.sample(observation), expected)
    assert sampler.executables.compiled == 0


def test_lora_is_to_be_merged_first():
    with pytest.raises(ValueError, match="merge"):
        Sampler(abstract_model(ModelConfig.variant("tiny_lora")))
