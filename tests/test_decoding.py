"""π0-FAST decodes in both frameworks what the model says, token by token, however it is run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import pi0_jax.loading
import pi0_jax.models.gemma as jax_gemma
import pi0_torch.loading
import pi0_torch.models.gemma as torch_gemma
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.masks import block_mask
from pi0.observation import Observation
from pi0.variants import get_variant
from pi0_eval.parity.inputs import Inputs
from tests.pi0_eval.parity.test_compare import random_parameters

pytestmark = pytest.mark.usefixtures("highest_precision")

CONFIG = get_variant("tiny_pi0_fast", max_decoding_steps=8)


def weights(seed: int) -> dict[str, np.ndarray]:
    return random_parameters(CONFIG, seed)


def prompts(seed: int = 0, batch: int = 3) -> Observation:
    """Random cameras and prompts of different lengths, as NumPy arrays."""
    return Inputs.random(CONFIG, batch, seed).observation.prompt_only()


def rows(observation: Observation, index: Any) -> Observation:
    return jax.tree.map(lambda x: x[index], observation)


@pytest.fixture(autouse=True)
def one_thread():
    """For models this small, PyTorch's threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sample_in_jax(params: dict[str, jax.Array], observation: Observation, **options: Any) -> jax.Array:
    """Parameters are arguments: compiled once for all models."""
    return pi0_jax.loading.merge(CONFIG, params).sample_tokens(observation, **options)


def logits_in_jax(params: dict[str, jax.Array], observation: Observation, tokens: jax.Array) -> jax.Array:
    model = pi0_jax.loading.merge(CONFIG, params)
    prefix, valid = model.embed_prefix(observation)
    x = jnp.concatenate([prefix, model.paligemma.embed(tokens)], axis=1)
    count, length = tokens.shape[1], valid.sum(axis=1, keepdims=True)
    positions = jnp.concatenate([jnp.cumsum(valid, axis=1) - 1, length + 1 + jnp.arange(count)], axis=1)
    valid = jnp.concatenate([valid, jnp.ones(tokens.shape, bool)], axis=1)
    blocks = np.concatenate([np.zeros(prefix.shape[1], int), 1 + np.arange(count)])
    mask = block_mask(blocks, valid)
    (out,), _ = jax_gemma.joint_forward((model.paligemma,), (x,), (positions,), mask, (None,))
    before = jnp.concatenate([length - 1, prefix.shape[1] + jnp.arange(count)[None] + 0 * length], axis=1)[:, :-1]
    return model.paligemma.logits(jnp.take_along_axis(out, before[..., None], axis=1))


class InJax:
    """A model in JAX, called with NumPy arrays."""

    _sample = staticmethod(jax.jit(sample_in_jax, static_argnames=("max_decoding_steps", "temperature")))
    _logits = staticmethod(jax.jit(logits_in_jax))

    def __init__(self, params: dict[str, np.ndarray]):
        self.params = pi0_jax.loading.unflatten(params)

    def sample(self, observation: Observation, seed: int | None = None, **options: Any) -> np.ndarray:
        rng = None if seed is None else jax.random.key(seed)
        return np.asarray(self._sample(self.params, observation, rng=rng, **options))

    def logits(self, observation: Observation, tokens: np.ndarray) -> np.ndarray:
        """What predicts each of `tokens`, from all that comes before it, in one pass without a cache."""
        return np.asarray(self._logits(self.params, observation, tokens))

    def predictions(self, observation: Observation, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
        """How often decoding runs the output."""
        calls: list[int] = []
        logits = jax_gemma.Expert.logits

        def counted(expert: jax_gemma.Expert, x: jax.Array) -> jax.Array:
            jax.debug.callback(lambda: calls.append(1))
            return logits(expert, x)

        monkeypatch.setattr(jax_gemma.Expert, "logits", counted)
        jax.block_until_ready(jax.jit(lambda *args: sample_in_jax(*args, **options))(self.params, observation))
        jax.effects_barrier()
        return len(calls)


class InTorch:
    """A model in PyTorch, called with NumPy arrays."""

    def __init__(self, params: dict[str, np.ndarray]):
        ours = {name: Tensor.of(x) for name, x in params.items()}
        theirs = LAYOUTS["pi0_torch"].from_ours(CONFIG, ours)
        tensors = {name: pi0_torch.loading.to_torch(t.read(())) for name, t in theirs.items()}
        self.model = pi0_torch.loading.with_parameters(CONFIG, tensors)

    def sample(self, observation: Observation, seed: int | None = None, **options: Any) -> np.ndarray:
        rng = None if seed is None else torch.Generator().manual_seed(seed)
        options = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
        return self.model.sample_tokens(pi0_torch.to_device(observation), rng=rng, **options).numpy()

    @torch.no_grad()
    def logits(self, observation: Observation, tokens: np.ndarray) -> np.ndarray:
        """What predicts each of `tokens`, from all that comes before it, in one pass without a cache."""
        model, tokens = self.model, torch.tensor(tokens)
        prefix, valid = model.embed_prefix(pi0_torch.to_device(observation))
        x = torch.cat([prefix, model.paligemma.embed(tokens)], dim=1)
        count, length = tokens.shape[1], valid.sum(dim=1, keepdim=True)
        positions = torch.cat([valid.cumsum(dim=1) - 1, length + 1 + torch.arange(count)], dim=1)
        valid = torch.cat([valid, valid.new_ones(tokens.shape)], dim=1)
        blocks = np.concatenate([np.zeros(prefix.shape[1], int), 1 + np.arange(count)])
        mask = block_mask(torch.from_numpy(blocks), valid)
        (out,), _ = torch_gemma.joint_forward((model.paligemma,), (x,), (positions,), mask, (None,))
        before = torch.cat([length - 1, prefix.shape[1] + torch.arange(count)[None] + 0 * length], dim=1)[:, :-1]
        return model.paligemma.logits(out.gather(1, before[..., None].expand(-1, -1, out.shape[-1]))).numpy()

    def predictions(self, observation: Observation, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
        """How often decoding runs the output."""
        calls: list[int] = []
        logits = torch_gemma.Expert.logits
        monkeypatch.setattr(torch_gemma.Expert, "logits", lambda self, x: calls.append(1) or logits(self, x))
        self.sample(observation, **options)
        return len(calls)


FRAMEWORKS = pytest.mark.parametrize("framework", [InJax, InTorch])


def test_the_frameworks_write_the_same_tokens():
    """100 models and inputs. Only a tie within float32's rounding could differ; none of these has one."""
    written = set()
    for seed in range(100):
        params, observation = weights(seed), prompts(seed)
        in_jax, in_torch = (framework(params).sample(observation) for framework in (InJax, InTorch))
        np.testing.assert_array_equal(in_jax, in_torch, err_msg=f"seed {seed}")
        written |= set(in_jax.ravel().tolist())
    assert len(written) > 300  # of 512: not always the same few


@FRAMEWORKS
def test_the_cache_changes_nothing(framework):
    """Each token is the likeliest after all before it, computed anew: by induction, what decoding without a cache
    writes."""
    for seed in range(5):
        model, observation = framework(weights(seed)), prompts(seed)
        tokens = model.sample(observation, eos_token=-1)
        assert tokens.shape == (3, 8)
        np.testing.assert_array_equal(model.logits(observation, tokens).argmax(axis=-1), tokens)


@FRAMEWORKS
def test_a_batch_is_its_rows(framework):
    """Prompts of different lengths, rows that end at different tokens and one that does not."""
    model, observation = framework(weights(1)), prompts(1)
    tokens = model.sample(observation, eos_token=-1)
    for eos in (int(tokens[0, 2]), int(tokens[1, 0])):
        together = model.sample(observation, eos_token=eos)
        for i, row in enumerate(together):
            np.testing.assert_array_equal(model.sample(rows(observation, slice(i, i + 1)), eos_token=eos)[0], row)


@FRAMEWORKS
def test_padding_changes_nothing(framework):
    """Neither what lies in the padding of a prompt, nor zeros after it."""
    model, observation = framework(weights(2)), prompts(2)
    noise = np.random.default_rng(0).integers(0, CONFIG.vocab_size, observation.tokenized_prompt.shape)
    other = np.where(observation.tokenized_prompt_mask, observation.tokenized_prompt, noise.astype(np.int32))
    assert (other != observation.tokenized_prompt).any()
    changed = dataclasses.replace(observation, tokenized_prompt=other)
    np.testing.assert_array_equal(model.sample(changed), model.sample(observation))


@FRAMEWORKS
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 0}], ids=["greedy", "sampled"])
def test_only_allowed_tokens_are_written(framework, options: dict):
    rng = np.random.default_rng(0)
    for seed in range(10):
        model, observation = framework(weights(seed)), prompts(seed)
        allowed = rng.random(CONFIG.vocab_size) < 0.02
        free, tokens = model.sample(observation, eos_token=-1), model.sample(observation, allowed=allowed, **options)
        assert allowed.any() and allowed[tokens[tokens != 0]].all() and not allowed[free].all()
    np.testing.assert_array_equal(  # all tokens allowed is no constraint
        model.sample(observation, allowed=np.ones(CONFIG.vocab_size, bool)), model.sample(observation)
    )


@FRAMEWORKS
def test_rows_end_with_eos_and_zeros(framework):
    model, observation = framework(weights(3)), prompts(3)
    free = model.sample(observation, eos_token=-1)
    eos = int(free[0, 3])
    tokens = model.sample(observation, eos_token=eos)
    for row, unstopped in zip(tokens, free, strict=True):
        end = int(np.argmax(unstopped == eos)) + 1 if eos in unstopped else len(unstopped)
        np.testing.assert_array_equal(row, np.where(np.arange(len(row)) < end, unstopped, 0))


@FRAMEWORKS
def test_decoding_stops_when_all_rows_have_ended(framework, monkeypatch):
    """The output is run once for each token up to the EOS, and not after it."""
    model, row = framework(weights(4)), prompts(4, batch=1)
    free = model.sample(row, eos_token=-1)[0]
    eos = int(free[2])
    expected = 1 + int(np.argmax(free == eos))
    assert model.predictions(row, monkeypatch, eos_token=eos) == expected < CONFIG.runtime.max_decoding_steps


@FRAMEWORKS
def test_a_temperature_draws_from_the_models_probabilities(framework):
    """The first token of 400 rows of one observation, from three allowed tokens: frequencies within 5 standard
    deviations of softmax(logits / temperature)."""
    model, count = framework(weights(5)), 400
    one = rows(prompts(5), slice(0, 1))
    many = jax.tree.map(lambda x: np.repeat(x, count, axis=0), one)
    logits = model.logits(one, np.zeros((1, 1), np.int32))[0, 0]
    chosen = np.argsort(logits)[[-1, -40, 3]]
    allowed = np.isin(np.arange(CONFIG.vocab_size), chosen)
    tokens = model.sample(many, seed=0, temperature=0.5, allowed=allowed, max_decoding_steps=1)[:, 0]
    p = np.exp(logits[chosen] / 0.5)
    p /= p.sum()
    frequencies = np.array([(tokens == token).mean() for token in chosen])
    assert (np.abs(frequencies - p) < 5 * np.sqrt(p * (1 - p) / count)).all(), (frequencies, p)


@FRAMEWORKS
def test_sampling_is_seeded(framework):
    model, observation, allowed = framework(weights(6)), prompts(6), np.ones(CONFIG.vocab_size, bool)
    first, again, other = (model.sample(observation, seed=s, temperature=1.0, allowed=allowed) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@FRAMEWORKS
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 1.0}, "temperature is 1.0.*rng"),
        ({"temperature": -1.0, "seed": 0}, "temperature is -1.0"),
        ({"max_decoding_steps": 0}, "max_decoding_steps is 0"),
    ],
)
def test_impossible_decoding_is_refused(framework, options: dict, said: str):
    with pytest.raises(ValueError, match=said):
        framework(weights(0)).sample(prompts(), **options)


@FRAMEWORKS
def test_a_loss_without_targets_is_refused(framework):
    model = pi0_torch.Pi0Fast(CONFIG) if framework is InTorch else pi0_jax.loading.abstract_model(CONFIG)
    with pytest.raises(ValueError, match=r"token_ar_mask.*token_loss_mask"):
        model.compute_loss(prompts())
