from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pi0_jax
from pi0.config import ModelConfig
from pi0.policy.buckets import compact
from pi0.variants import get_variant
from pi0_eval.parity.inputs import Inputs
from pi0_jax.loading import abstract_model, make_model
from pi0_jax.sampler import Sampler
from tests.golden_case import GoldenCase
from tests.sampler_case import BUCKETS, config, distance, observations, seen, varied

ROOT = Path(__file__).parents[2]
FLOAT32 = 3e-6  # relative L2 of actions: rounding through a whole model, as between the two frameworks
PLAIN = jax.jit(lambda model, observation, noise: model.sample_actions(observation, noise))
PLAIN_WITH_SUBTASK = jax.jit(
    lambda model, o, n, subtask, eos: model.sample_with_subtask(o, n, subtask, eos_token=eos), static_argnums=4
)


def random_model(model: ModelConfig) -> Any:
    """No norm or gate is at its start, where leaving it out would not show."""
    made, rng = jax.jit(lambda: make_model(model, rngs=nnx.Rngs(0)))(), np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), made)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Every compilation from now on."""
    events: list[str] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if "compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


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
    on_device = jax.device_put((inputs.observation, inputs.noise))
    np.testing.assert_array_equal(from_numpy, sampler.sample(*on_device))


@pytest.mark.parametrize("batches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_nothing_compiles_after_warm_up(batches: int, compilations: list[str]):
    model = random_model(config("pi0", depth=1, num_steps=1))
    sampler = Sampler(model, text_buckets=(4,), warm_up=False)
    sampler.warm_up(batches=range(1, batches + 1), cameras=(1, 2))
    calls = list(varied(model.config, 200, batches))
    compilations.clear()
    for inputs in calls:
        sampler.sample(inputs.observation, inputs.noise)
    assert compilations == []
    jax.jit(lambda x: x + 0.12345)(1.0).block_until_ready()
    assert compilations, "the counter does not count"


def test_a_restart_compiles_nothing(tmp_path: Path):
    """In a process of its own, as after a restart: the programs come out of the user's own cache."""
    script = (
        "import jax, numpy as np\nfrom flax import nnx\nfrom pi0.variants import get_variant\n"
        "from pi0_jax.sampler import Sampler\nfrom pi0_jax.loading import make_model\n"
        "hits = []\njax.monitoring.register_event_listener(lambda event, **_: hits.append(event))\n"
        "model = make_model(get_variant('tiny'), rngs=nnx.Rngs(0))\nbefore = len(hits)\n"
        "Sampler(model, text_buckets=())\nfound = [hit.split('/')[-1] for hit in hits[before:]]\n"
        "print(found.count('cache_hits'), found.count('cache_misses'))\n"
    )
    environment = {**os.environ, "PI0_CACHE": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def restart() -> list[int]:
        command = [sys.executable, "-c", script]
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return [int(number) for number in run.stdout.split()[-2:]]

    assert restart()[1] > 0
    assert any((tmp_path / "jax").iterdir())
    hits, misses = restart()
    assert hits > 0
    assert misses == 0


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.target, "code from a checkpoint ran")


def test_a_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever lies beside the weights: nothing there is unpickled, and nothing is written there."""
    unpickled = []
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, lambda *_, name=name, **__: unpickled.append(name))
    folder = shutil.copytree(ROOT / "tests/golden/pi0/checkpoint", tmp_path / "checkpoint")
    (folder / "executables").mkdir()
    payload = pickle.dumps(Bomb(tmp_path / "ran"))
    for name in ("weights", "sample"):
        (folder / "executables" / f"{name}.bin").write_bytes(hashlib.sha256(payload).digest() + payload)
    before = sorted(folder.rglob("*"))
    model = pi0_jax.load(folder, config=GoldenCase("pi0").config("float32"))
    Sampler(model, text_buckets=(), warm_up=False)
    assert not (tmp_path / "ran").exists()
    assert unpickled == []
    assert sorted(folder.rglob("*")) == before


def test_tokens_of_a_cut_prompt(highest_precision: None):
    """π0-FAST decodes the same after a prompt that is cut to its bucket, over a shorter cache."""
    model = random_model(get_variant("tiny_pi0_fast"))
    inputs = Inputs.random(model.config, batch=3).observation.prompt_only()
    mask = np.arange(model.config.max_token_len) < np.array([[5], [2], [4]])
    observation = dataclasses.replace(inputs, tokenized_prompt_mask=mask)
    assert compact(observation, model.config, BUCKETS).tokenized_prompt.shape == (3, 5)
    expected = jax.jit(lambda model, o: model.sample_tokens(o, 6, eos_token=-1))(model, observation)
    sampler = Sampler(model, num_steps=6, text_buckets=BUCKETS, eos_token=-1, warm_up=False)
    np.testing.assert_array_equal(sampler.sample(observation), expected)


def test_tokens_in_bfloat16_are_those_of_the_plain_model(highest_precision: None):
    """The same roundings at the same places: queries stay float32. No near tie in these prompts."""
    model = random_model(get_variant("tiny_pi0_fast", dtype="bfloat16"))
    observation = Inputs.random(model.config, batch=8).observation.prompt_only()
    expected = jax.jit(lambda model, o: model.sample_tokens(o, 1, eos_token=-1))(model, observation)
    sampler = Sampler(model, num_steps=1, eos_token=-1, warm_up=False)
    np.testing.assert_array_equal(sampler.sample(observation), expected)


def test_subtasks(highest_precision: None):
    """Predicted and given: the plain model's tokens, and its actions after them."""
    model = random_model(dataclasses.replace(config("pi05"), max_token_len=8).with_runtime(max_decoding_steps=4))
    inputs = Inputs.random(model.config, batch=3, seed=1)
    eos = int(np.asarray(PLAIN_WITH_SUBTASK(model, inputs.observation, inputs.noise, None, -1)[0])[1, 1])
    sampler = Sampler(model, text_buckets=BUCKETS, subtasks=True, eos_token=eos, warm_up=False)
    for subtask in (None, np.array([[5, 6, eos, 0], [eos, 0, 0, 0], [3, 4, 5, 6]], np.int32)):
        tokens, actions = sampler.sample_with_subtask(inputs.observation, inputs.noise, subtask)
        expected = PLAIN_WITH_SUBTASK(model, inputs.observation, inputs.noise, subtask, eos)
        np.testing.assert_array_equal(tokens, expected[0])
        assert distance(actions, expected[1]) <= FLOAT32
    assert (
        distance(sampler.sample(inputs.observation, inputs.noise), PLAIN(model, inputs.observation, inputs.noise))
        <= FLOAT32
    )


@pytest.mark.parametrize("variant", ["tiny_lora", "tiny_pi0_fast_lora"])
def test_lora_is_merged(variant: str, highest_precision: None):
    """Actions as with the updates apart, to their own rounding; tokens identical."""
    model = random_model(get_variant(variant))
    inputs = Inputs.random(model.config, batch=2, seed=2)
    observation = inputs.observation.prompt_only()
    sampler = Sampler(model, num_steps=3, warm_up=False)
    actions = sampler.sample(observation, inputs.noise)
    expected = jax.jit(lambda m, o, n: m.sample(o, n, 3))(model, observation, inputs.noise)
    assert distance(actions, expected) <= FLOAT32


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_independent(how: Any):
    model = random_model(config("pi0", depth=1, num_steps=1))
    inputs = seen(model.config, 1, model.config.image_keys, 4, seed=0)
    sampler = Sampler(model, warm_up=False)
    before = np.asarray(sampler.sample(inputs.observation, inputs.noise))
    other = how(sampler)
    for array in jax.tree.leaves(sampler.weights):
        array.delete()
    np.testing.assert_array_equal(other.sample(inputs.observation, inputs.noise), before)


def test_stages():
    """In order of computation, and with what the sampler computes."""
    model = random_model(config("pi0", depth=1, num_steps=1))
    inputs = seen(model.config, 2, model.config.image_keys, 4, seed=0)
    stages = Sampler(model, text_buckets=BUCKETS, warm_up=False).stages(inputs.observation, inputs.noise)
    assert list(stages) == ["vision", "prefix"]
    tokens, valid = stages["vision"]()
    assert tokens.shape[:2] == valid.shape == (2, 3 * model.config.image_tokens + 5)  # the bucket of 4 tokens
    cache, _, seen_tokens = stages["prefix"]()
    assert cache[0][0].shape[2] == tokens.shape[1]
    np.testing.assert_array_equal(seen_tokens, valid)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("tiny", {"subtasks": True}, "writes no subtasks"),
        ("tiny_pi0_fast", {"subtasks": True}, "writes no subtasks"),
        ("tiny", {"runtime": {"attention": "xla"}}, "attention is 'xla'"),
    ],
)
def test_what_it_cannot_do_is_refused(variant: str, options: dict, message: str):
    model = abstract_model(get_variant(variant, **options.pop("runtime", {})))
    with pytest.raises(ValueError, match=message):
        Sampler(model, **options)


def test_subtasks_must_be_asked_for():
    model = random_model(config("pi05", depth=1, num_steps=1))
    inputs = seen(model.config, 1, model.config.image_keys, 4, seed=0)
    with pytest.raises(ValueError, match="subtasks=True"):
        Sampler(model, warm_up=False).sample_with_subtask(inputs.observation, inputs.noise)
