from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0 import masks
from pi0.run_config import RecipeConfig
from pi0_jax.loading import parameters_of, with_parameters
from pi0_jax.models.gemma import joint_forward
from tests.compiled import AS_IN_USE
from tests.recipe_case import BATCH, CONFIG, LENGTHS, mixed_batch, random_parameters

FLOW = RecipeConfig(text_weight=0, fast_weight=0, flow_weight=1, insulated=False)
INSULATED = dataclasses.replace(FLOW, insulated=True)
VLM = ("vision.", "paligemma.")


@pytest.fixture(scope="module")
def model():
    return with_parameters(CONFIG, {name: jnp.asarray(value) for name, value in random_parameters().items()})


def plain_batch():
    observation, *rest = mixed_batch()
    return (observation.prompt_only(), *rest)


@partial(jax.jit, compiler_options=AS_IN_USE)
def plain(model, observation, actions, noise, time):
    return jax.value_and_grad(lambda m: m.compute_loss(observation, actions, noise, time).mean())(model)


@partial(jax.jit, static_argnames="recipe", compiler_options=AS_IN_USE)
def flow(model, observation, actions, noise, time, recipe):
    return jax.value_and_grad(lambda m: m.loss_parts(observation, actions, noise, time, recipe)["flow"].mean())(model)


def test_without_text_it_is_plain_pi05(model):
    """Loss and gradients, bit for bit, but for the one that is a sum alone: each program may add in another order."""
    observation, *rest = plain_batch()
    group = np.zeros(observation.tokenized_prompt.shape, np.int32)
    nothing = dataclasses.replace(observation, token_group=group, has_actions=np.ones(BATCH, bool))
    (loss, gradient), (same_loss, same) = plain(model, observation, *rest), flow(model, nothing, *rest, FLOW)
    assert loss.tobytes() == same_loss.tobytes()
    for name, value in parameters_of(gradient).items():
        other = parameters_of(same)[name]
        if name == "action_out_proj.bias":
            assert np.linalg.norm(value - other) <= 1e-6 * np.linalg.norm(value)
        else:
            np.testing.assert_array_equal(value, other, err_msg=name)


def test_without_a_subtask_the_actions_are_plain_pi05s(model):
    """Bit for bit: a subtask of no tokens leaves the cache as it was."""
    observation, _, noise, _ = plain_batch()
    nothing = np.zeros((BATCH, 0), np.int32)
    empty = jax.jit(lambda m, o, n: m.integrate(o, n, 2, *m.read_text(o, nothing, 1)[1:]))(model, observation, noise)
    actions = jax.jit(lambda m, o, n: m.sample_actions(o, n, 2))(model, observation, noise)
    np.testing.assert_array_equal(actions, empty)


def test_knowledge_insulation(model):
    """Of every parameter: PaliGemma's and the tower's gradient is exactly zero, the action expert's as without."""
    batch = mixed_batch()
    loss, free = flow(model, *batch, FLOW)
    same_loss, insulated = flow(model, *batch, INSULATED)
    np.testing.assert_allclose(same_loss, loss, rtol=1e-6)  # the same sums, in another order
    free, insulated = parameters_of(free), parameters_of(insulated)
    largest = max(float(jnp.abs(value).max()) for value in free.values())
    for name, value in insulated.items():
        if name.startswith(VLM):
            assert not np.any(value), name
            # What never reaches the velocity has no gradient anyway; SigLIP's key bias none but rounding.
            assert np.any(free[name]) or name == "paligemma.final_norm.scale", name
        else:
            np.testing.assert_allclose(value, free[name], rtol=0, atol=1e-6 * largest, err_msg=name)


def test_the_parts_of_a_mixed_batch(model):
    """Each example has the parts it should, and they are the cross-entropies of its own tokens, summed by hand."""
    observation, *rest = mixed_batch()
    losses = jax.jit(lambda m, *b: m.loss_parts(*b, RecipeConfig()))(model, observation, *rest)
    assert (np.asarray(losses["text"]) > 0).tolist() == [subtask > 0 for _, subtask, _ in LENGTHS]
    assert (np.asarray(losses["fast"]) > 0).tolist() == [fast > 0 for *_, fast in LENGTHS]
    assert (np.asarray(losses["flow"]) > 0).all(axis=1).tolist() == observation.has_actions.tolist()
    prefix, valid = model.embed_prefix(observation)
    groups = model.prefix_groups(observation)
    positions, mask = masks.positions(groups, valid), masks.attention_mask(groups, valid)
    (out,), _ = joint_forward((model.paligemma,), (prefix,), (positions,), mask, (None,))
    first = prefix.shape[1] - CONFIG.max_token_len
    prompt, subtask, _ = LENGTHS[0]
    log_p = jax.nn.log_softmax(model.paligemma.logits(out)[0])
    by_hand = [-log_p[first + i - 1, observation.tokenized_prompt[0, i]] for i in range(prompt, prompt + subtask)]
    np.testing.assert_allclose(losses["text"][0], np.mean(by_hand), rtol=1e-5)
    only = jax.jit(lambda m, *b: m.loss_parts(*b, RecipeConfig(fast_weight=0, flow_weight=0)))
    alone = only(model, observation, *rest)
    assert set(alone) == {"text"}  # and the action expert did not run: the same to rounding
    np.testing.assert_allclose(alone["text"], losses["text"], rtol=1e-5)


STAGES = {
    "pre-training": (masks.PREFIX, masks.SUBTASK, masks.FAST),
    "post-training": masks.GROUPS,
    "inference": (masks.PREFIX, masks.SUBTASK, masks.ACTIONS),
}


@pytest.mark.parametrize(
    ("stage", "insulated"),
    [("pre-training", False), ("post-training", False), ("post-training", True), ("inference", False)],
)
def test_no_token_is_reached_by_one_that_it_may_not_see(model, stage: str, insulated: bool):
    """Row j of the batch changes token j. Whoever does not see it stays the same, bit for bit; all others change."""
    groups = np.repeat(STAGES[stage], 3)
    count, actions = len(groups), int((groups == masks.ACTIONS).sum())
    rng = np.random.default_rng(0)
    experts = (model.paligemma, model.action_expert)[: 1 + bool(actions)]
    widths = (CONFIG.paligemma.width, CONFIG.action_expert.width)
    xs = [
        np.tile(rng.normal(size=(1, n, w)).astype(np.float32), (count, 1, 1))
        for n, w in zip((count - actions, actions), widths, strict=True)
    ][: len(experts)]
    changed = [x.copy() for x in xs]
    for j in range(count):
        part, place = (0, j) if j < count - actions else (1, j - count + actions)
        changed[part][j, place] += 1
    blocks, valid = jnp.asarray(np.tile(groups, (count, 1))), jnp.ones((count, count), bool)
    positions, mask = masks.positions(blocks, valid), masks.attention_mask(blocks, valid)
    condition = rng.normal(size=(count, widths[1])).astype(np.float32) if actions else None

    @jax.jit
    def run(xs):
        split = count - actions
        outs, _ = joint_forward(
            experts,
            xs,
            (positions[:, :split], positions[:, split:])[: len(xs)],
            mask,
            (None, condition)[: len(xs)],
            insulated=insulated and len(xs) == 2,
        )
        return outs

    before, after = run(xs), run(changed)
    reached = np.concatenate([(b != a).any(-1) for b, a in zip(before, after, strict=True)], axis=1)  # [j, i]
    np.testing.assert_array_equal(reached.T, np.asarray(mask[0]))


@partial(jax.jit, static_argnames=("num_steps", "max_decoding_steps", "temperature"))
def sample(model, observation, noise, subtask=None, **options):
    return type(model).sample_with_subtask(model, observation, noise, subtask, **options)


def test_sampled_actions_see_what_training_showed_them(model):
    """One Euler step from t = 1 with zero actions: the squared sample is the flow loss, FAST tokens there or not."""
    observation, _, noise, _ = mixed_batch()
    subtask = np.zeros((BATCH, 6), np.int32)
    for row, (prompt, length, _) in enumerate(LENGTHS):  # as the rows have them; the end is what training calls so
        subtask[row, :length] = observation.tokenized_prompt[row, prompt : prompt + length]
        observation.tokenized_prompt[row, prompt + max(length - 1, 0)] = 1 if length else 7
        subtask[row, max(length - 1, 0)] = 1
    rows = [row for row, (_, length, _) in enumerate(LENGTHS) if length and row != 2]
    losses = jax.jit(lambda m, o, n: m.loss_parts(o, 0 * n, n, jnp.ones(BATCH), FLOW))(model, observation, noise)
    _, sampled = sample(model, observation, noise, subtask, num_steps=1)
    np.testing.assert_allclose(np.square(sampled).mean(-1)[rows], losses["flow"][jnp.array(rows)], rtol=1e-5)


def test_a_written_subtask_is_as_good_as_a_given_one(model):
    """The cache that decoding grew gives the actions of one pass over prompt and subtask, to float32's rounding."""
    observation, _, noise, _ = mixed_batch()
    tokens, actions = sample(model, observation, noise, num_steps=2, max_decoding_steps=5)
    ended = np.asarray(tokens).copy()
    ended[0, 2:] = (1, 0, 0)  # and one that ends early, given
    _, same = sample(model, observation, noise, tokens, num_steps=2)
    np.testing.assert_allclose(same, actions, rtol=0, atol=3e-6 * float(jnp.abs(actions).max()))
    _, other = sample(model, observation, noise, ended, num_steps=2)
    assert not np.allclose(other[0], actions[0], atol=1e-3)
    short = np.where(np.arange(4) < 3, ended[:, :4], 0)  # what follows the end is not seen
    _, padded = sample(model, observation, noise, short, num_steps=2)
    np.testing.assert_allclose(padded[0], other[0], rtol=0, atol=3e-6 * float(jnp.abs(actions).max()))


def test_temperature(model):
    observation, _, noise, _ = mixed_batch()
    draw = partial(sample, model, observation, noise, num_steps=1, max_decoding_steps=4, temperature=1.0)
    first, again, other = (draw(rng=jax.random.key(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    with pytest.raises(ValueError, match="temperature"):
        sample(model, observation, noise, num_steps=1, max_decoding_steps=4, temperature=1.0)
    with pytest.raises(ValueError, match="max_decoding_steps"):
        sample(model, observation, noise, num_steps=1, max_decoding_steps=0)
