from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pi0_torch
import pi0_torch.sampler
from pi0.config import ModelConfig
from pi0.policy.buckets import compact
from pi0.variants import get_variant
from pi0_eval.parity.inputs import Inputs
from pi0_torch.attention import ATTENTION
from pi0_torch.loading import make_model
from pi0_torch.sampler import Sampler
from tests.sampler_case import BUCKETS, config, distance, observations, seen, varied

FLOAT32 = 3e-6  # relative L2 of actions: rounding through a whole model, as between the two frameworks


def random_model(model: ModelConfig) -> Any:
    """No norm or gate is at its start, where leaving it out would not show."""
    torch.manual_seed(0)
    made = make_model(model)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return made


def plain(model: Any, inputs: Inputs) -> torch.Tensor:
    return model.sample_actions(pi0_torch.to_device(inputs.observation), torch.from_numpy(inputs.noise))


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_the_same_actions(kind: str):
    model = random_model(config(kind))
    here = [name for name in ATTENTION if name != "flash"]
    samplers = {name: Sampler(model, text_buckets=BUCKETS, attention=name, compile=False) for name in here}
    for name, inputs in observations(model.config):
        expected = plain(model, inputs)
        for attention in samplers if name in ("mixed", "4 tokens") else ["sdpa"]:
            actions = samplers[attention].sample(inputs.observation, inputs.noise)
            assert actions.dtype == torch.float32
            assert distance(actions, expected) <= FLOAT32, (attention, name)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_bfloat16_is_as_near_to_float32_as_the_plain_model(kind: str):
    """× 1.2 for another, equally good order of rounding; over 32 rows, so that chance evens out."""
    exact, model = random_model(config(kind)), random_model(config(kind, "bfloat16"))
    inputs = seen(model.config, 32, model.config.image_keys, 8, seed=0)
    expected = plain(exact, inputs)
    for rounded in (model, model.bfloat16()):  # the parameters too
        allowed = 1.2 * distance(plain(rounded, inputs), expected)
        for attention in ("sdpa", "eager"):
            sampler = Sampler(rounded, attention=attention, compile=False, warm_up=False)
            assert distance(sampler.sample(inputs.observation, inputs.noise), expected) <= allowed, attention


def test_tensors_do_too():
    model = random_model(config("pi0"))
    inputs = seen(model.config, 2, model.config.image_keys[1:], 4, seed=0)
    sampler = Sampler(model, text_buckets=BUCKETS, compile=False, warm_up=False)
    from_numpy = sampler.sample(inputs.observation, inputs.noise)
    on_device = sampler.sample(pi0_torch.to_device(inputs.observation), torch.from_numpy(inputs.noise))
    np.testing.assert_array_equal(from_numpy, on_device)


def storages(module: torch.nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}


@pytest.mark.parametrize("variant", ["tiny", "tiny_lora", "tiny_pi05", "tiny_pi0_fast"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_a_snapshot(variant: str, dtype: str):
    """After any change of the model's weights it computes with all of the old ones."""
    model = random_model(get_variant(variant, dtype=dtype)).to(getattr(torch, dtype))
    inputs = Inputs.random(model.config, batch=2)
    sampler = Sampler(model, num_steps=3, compile=False, warm_up=False)
    assert not storages(model) & storages(sampler.weights)
    before, run = sampler.sample(inputs.observation, inputs.noise), sampler.sample
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(run(inputs.observation, inputs.noise), before)
    model.load_state_dict({name: torch.zeros_like(p) for name, p in model.state_dict().items()})
    assert torch.equal(run(inputs.observation, inputs.noise), before)


def test_the_text_embedding_is_kept_as_it_is_read():
    """It is the largest tensor: in the compute dtype, but where logits are multiplied in its own."""
    pi0, fast = (random_model(get_variant(name, dtype="bfloat16")) for name in ("tiny", "tiny_pi0_fast"))
    kept = [Sampler(model, compile=False, warm_up=False).weights["embedding"][0].dtype for model in (pi0, fast)]
    assert kept == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("compile", [False, True])
def test_copies_are_independent(how: Any, compile: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = random_model(config("pi05", depth=1, num_steps=1))
    inputs = seen(model.config, 1, model.config.image_keys, 4, seed=0)
    sampler = Sampler(model, subtasks=True, compile=compile, warm_up=False)
    before = sampler.sample(inputs.observation, inputs.noise)
    other = how(sampler)
    assert not storages(sampler.weights) & storages(other.weights)
    for parameter in sampler.weights.parameters():
        parameter.data.zero_()
    assert torch.equal(other.sample(inputs.observation, inputs.noise), before)
    assert not torch.equal(sampler.sample(inputs.observation, inputs.noise), before)
    tokens, actions = other.sample_with_subtask(inputs.observation, inputs.noise)
    assert tokens.shape[0] == 1 and actions.isfinite().all()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("batches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_nothing_compiles_after_warm_up(batches: int, monkeypatch: pytest.MonkeyPatch):
    """One graph per shape, counted by the tracer; run as traced, since generating code for each would take minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    model = random_model(config("pi0", depth=1, num_steps=1))
    sampler = Sampler(model, text_buckets=(4,), compile=True, warm_up=False)
    before = graphs()
    sampler.warm_up(batches=range(1, batches + 1), cameras=(1, 2))
    made = graphs()
    assert made - before == batches * 2 * 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for inputs in varied(model.config, 200, batches):
            actions = sampler.sample(inputs.observation, inputs.noise)
    assert graphs() == made
    assert distance(actions, plain(model, inputs)) <= FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # flex needs a GPU
def test_compiled(kind: str, attention: str):
    """The whole sampler as one graph of generated code."""
    model = random_model(config(kind, num_steps=2))
    sampler = Sampler(model, attention=attention, compile=True)
    inputs = seen(model.config, 1, model.config.image_keys, 8, seed=0)
    assert distance(sampler.sample(inputs.observation, inputs.noise), plain(model, inputs)) <= FLOAT32


class Flash:
    """What we use of flash-attn, as it documents it: queries [B, R, N, H], keys and values [B, S, K, H]."""

    @staticmethod
    def flash_attn_func(q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2)

    @staticmethod
    def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, cache_leftpad):
        assert cache_seqlens.dtype == cache_leftpad.dtype == torch.int32
        used = [slice(left, end) for left, end in zip(cache_leftpad, cache_seqlens, strict=True)]
        rows = [Flash.flash_attn_func(q[i, None], k_cache[i, None, s], v_cache[i, None, s]) for i, s in enumerate(used)]
        return torch.cat(rows)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_flash_gets_the_padding_at_the_left(kind: str, monkeypatch: pytest.MonkeyPatch):
    """The kernels need a GPU; what is given to them and what is made of the result does not."""
    monkeypatch.setitem(sys.modules, "flash_attn", Flash)
    monkeypatch.setattr(pi0_torch.sampler, "attention_backend", lambda name, *_, **__: ATTENTION[name])
    model = random_model(config(kind))
    sampler = Sampler(model, text_buckets=BUCKETS, attention="flash", compile=False, warm_up=False)
    for name, inputs in observations(model.config):
        if name in ("mixed", "4 tokens"):
            assert distance(sampler.sample(inputs.observation, inputs.noise), plain(model, inputs)) <= FLOAT32, name


@pytest.mark.parametrize(
    ("attention", "message"),
    [("fast", "must be one of sdpa"), ("flash", "needs .*a GPU, not cpu"), ("flex", "cannot compile it on a CPU")],
)
def test_attention_that_is_not_to_be_had(attention: str, message: str):
    with pytest.raises(ValueError, match=message):
        Sampler(random_model(config("pi0", depth=1)), attention=attention, compile=True)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tokens_of_a_cut_prompt(compile: bool):
    """π0-FAST decodes the same after a prompt that is cut to its bucket, over a shorter cache."""
    model = random_model(get_variant("tiny_pi0_fast"))
    inputs = Inputs.random(model.config, batch=3).observation.prompt_only()
    mask = np.arange(model.config.max_token_len) < np.array([[5], [2], [4]])
    observation = dataclasses.replace(inputs, tokenized_prompt_mask=mask)
    assert compact(observation, model.config, BUCKETS).tokenized_prompt.shape == (3, 5)
    expected = model.sample_tokens(pi0_torch.to_device(observation), 6, eos_token=-1)
    sampler = Sampler(model, num_steps=6, text_buckets=BUCKETS, eos_token=-1, compile=compile, warm_up=False)
    assert torch.equal(sampler.sample(observation), expected)


def test_tokens_in_bfloat16_are_those_of_the_plain_model():
    """The same roundings at the same places: queries stay float32. No near tie in these prompts."""
    model = random_model(get_variant("tiny_pi0_fast", dtype="bfloat16"))
    observation = Inputs.random(model.config, batch=8).observation.prompt_only()
    expected = model.sample_tokens(pi0_torch.to_device(observation), 1, eos_token=-1)
    assert torch.equal(Sampler(model, num_steps=1, eos_token=-1, warm_up=False).sample(observation), expected)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_subtasks(compile: bool):
    """Predicted and given: the plain model's tokens, and its actions after them."""
    model = random_model(dataclasses.replace(config("pi05"), max_token_len=8).with_runtime(max_decoding_steps=4))
    inputs = Inputs.random(model.config, batch=3, seed=1)
    here = pi0_torch.to_device(inputs.observation), torch.from_numpy(inputs.noise)
    eos = int(model.sample_with_subtask(*here, eos_token=-1)[0][1, 1])
    options = {"text_buckets": BUCKETS, "subtasks": True, "eos_token": eos, "compile": compile, "warm_up": False}
    sampler = Sampler(model, **options)
    for subtask in (None, np.array([[5, 6, eos, 0], [eos, 0, 0, 0], [3, 4, 5, 6]], np.int32)):
        given = None if subtask is None else torch.from_numpy(subtask)
        expected = model.sample_with_subtask(*here, given, eos_token=eos)
        tokens, actions = sampler.sample_with_subtask(inputs.observation, inputs.noise, subtask)
        assert torch.equal(tokens, expected[0])
        assert distance(actions, expected[1]) <= FLOAT32
    assert distance(sampler.sample(inputs.observation, inputs.noise), plain(model, inputs)) <= FLOAT32


@pytest.mark.parametrize("variant", ["tiny_lora", "tiny_pi0_fast_lora"])
def test_lora_is_merged(variant: str):
    """Actions as with the updates apart, to their own rounding; tokens identical."""
    model = random_model(get_variant(variant))
    inputs = Inputs.random(model.config, batch=2, seed=2)
    observation = inputs.observation.prompt_only()
    actions = Sampler(model, num_steps=3, warm_up=False).sample(observation, inputs.noise)
    expected = model.sample(pi0_torch.to_device(observation), torch.from_numpy(inputs.noise), 3)
    assert distance(actions, expected) <= FLOAT32


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
    assert torch.equal(seen_tokens, valid)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("tiny", {"subtasks": True}, "writes no subtasks"),
        ("tiny_pi0_fast", {"subtasks": True}, "writes no subtasks"),
        ("tiny_pi0_fast", {"attention": "sdpa"}, "float32 queries"),
    ],
)
def test_what_it_cannot_do_is_refused(variant: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Sampler(make_model(get_variant(variant, dtype="bfloat16")), **options)


def test_subtasks_must_be_asked_for():
    model = random_model(config("pi05", depth=1, num_steps=1))
    inputs = seen(model.config, 1, model.config.image_keys, 4, seed=0)
    with pytest.raises(ValueError, match="subtasks=True"):
        Sampler(model, warm_up=False).sample_with_subtask(inputs.observation, inputs.noise)
