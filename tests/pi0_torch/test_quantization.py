from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pi0_torch
from pi0.config import ConfigError
from pi0.quantization import QuantizationConfig
from pi0.variants import get_variant
from pi0_eval.parity.inputs import Inputs
from pi0_torch.quantization import (
    ChannelWeight,
    RoundedProduct,
    calibration,
    make_weight,
    model_layers,
    quantize,
    sampler_layers,
    simulate,
    stored_bytes,
)
from pi0_torch.sampler import Sampler
from tests.pi0_torch.test_sampler import random_model
from tests.sampler_case import distance

VARIANTS = ("tiny", "tiny_pi05", "tiny_lora")
FLOAT32 = 3e-6


def sampler_of(model: Any, **options: Any) -> Sampler:
    return Sampler(model, compile=False, warm_up=False, **options)


def sample(sampler: Sampler, inputs: Inputs) -> Tensor:
    return sampler.sample(inputs.observation, inputs.noise)


def ranges_of(model: Any, inputs: Inputs) -> dict[str, float]:
    with calibration(model, sampler_layers(sampler_of(model).weights).keys()) as ranges:
        model.sample(pi0_torch.to_device(inputs.observation), torch.from_numpy(inputs.noise))
    return ranges


def weights(outputs: int = 24, inputs: int = 70) -> Tensor:
    """Channels of very different sizes, one of zeros, and a value far beyond the others."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((outputs, inputs)) * 10.0 ** rng.integers(-4, 3, (outputs, 1))
    values[3], values[5, 7] = 0, 20 * np.abs(values[5]).max()
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize(("format", "steps"), [("int8", 127), ("int4", 7)])
def test_whole_numbers_are_within_half_a_step(format: str, steps: int):
    """int8 by the channel; int4 by groups of 32, where the scale covers less than the largest if that is better."""
    weight = weights()
    made = make_weight(weight, format, torch.float32, 32)
    error, whole = (made.whole() - weight).abs(), made.whole()
    assert whole[3].eq(0).all() and whole.isfinite().all()
    if format == "int8":
        step = weight.abs().amax(1, keepdim=True) / steps
        assert (error <= step * 0.5001).all() and (error > step * 0.3).any()
        return
    for first in range(0, 70, 32):
        own, off = weight[:, first : first + 32], error[:, first : first + 32]
        step = own.abs().amax(1, keepdim=True) / steps
        plain = ((own / step.clamp(min=1e-30)).round() * step - own).square().sum(1)
        assert (off.square().sum(1) <= plain * 1.0001).all() and (off.square().sum(1) < plain * 0.99).any()


def test_float8_keeps_three_bits_of_each_weight():
    weight, made = weights(), make_weight(weights(), "float8", torch.float32, 32)
    small = weight.abs().amax(1, keepdim=True) / 448 * 2.0**-6  # below which float8 has steps of one size
    assert ((made.whole() - weight).abs() <= torch.maximum(weight.abs() * 2.0**-4, small * 2.0**-4)).all()


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_rounded_weights(format: str, dtype: torch.dtype):
    weight, generator = weights(), torch.Generator().manual_seed(0)
    made = make_weight(weight, format, dtype, 32)
    x, bias = torch.randn(2, 3, 70, generator=generator).to(dtype), torch.randn(24, generator=generator).to(dtype)
    y, expected = made(x, bias), x.double() @ made.whole().double().T + bias.double()
    assert y.dtype == dtype
    assert distance(y.float(), expected) <= (1e-6 if dtype == torch.float32 else 8e-3)
    indices = torch.tensor([[1, 5], [3, 0]])
    assert torch.equal(made.rows(indices), made.whole()[indices])


@pytest.mark.parametrize("count", [1, 40])
def test_whole_numbers_are_multiplied_as_they_are(count: int):
    """In float64 the rounded inputs and weights give the same; sizes that no hardware takes are filled up."""
    weight, x = weights(21, 70), torch.randn(count, 70, generator=torch.Generator().manual_seed(0))
    made = make_weight(weight, "int8", torch.float32, 32)
    assert isinstance(made, ChannelWeight)
    step = 2.0 / 127
    inputs = (x.double() / step).round().clamp(-127, 127) * step
    assert ((x.abs() > 2).any()) and not torch.equal(inputs.abs().amax(), x.double().abs().amax())
    y = RoundedProduct(made, 2.0)(x, torch.ones(21))
    assert distance(y, inputs @ made.whole().double().T + 1) <= 1e-6


def test_float8_is_multiplied_as_it_is():
    """Where this device has such products: rounded to bfloat16, as GPUs give them."""
    weight, x = weights(21, 70), torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
    made = make_weight(weight, "float8", torch.float32, 32)
    assert isinstance(made, ChannelWeight)
    try:
        y = RoundedProduct(made, 2.0)(x)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no product in float8 here: {error}")
    step = 2.0 / 448
    inputs = (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).double() * step
    assert distance(y, inputs @ made.whole().double().T) <= 2.0**-8


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("format", ["int8", "int4", "float8", "w8a8", "bfloat16"])
def test_the_sampler_computes_what_the_model_with_the_same_numbers_does(variant: str, format: str):
    model = random_model(get_variant(variant))
    inputs = Inputs.random(model.config, batch=2)
    sampler = sampler_of(model)
    before = sample(sampler, inputs)
    config = QuantizationConfig({"*": format}, input_ranges=ranges_of(model, inputs) if format == "w8a8" else {})
    formats = quantize(sampler, config)
    expected = simulate(model, config, formats).sample(
        pi0_torch.to_device(inputs.observation), torch.from_numpy(inputs.noise)
    )
    # one rounding of an input to the other side may follow from any order of a sum
    assert distance(sample(sampler, inputs), expected) <= (0.02 if format == "w8a8" else FLOAT32)
    assert distance(sample(sampler, inputs), before) >= (1e-3 if format != "bfloat16" else 1e-5)
    assert distance(sample(sampler, inputs), sample(sampler_of(model), inputs)) <= 0.5


def test_tokens_too():
    """The embedding of π0-FAST is read by rows and multiplied with, both in float32."""
    model = random_model(get_variant("tiny_pi0_fast", dtype="bfloat16"))
    inputs = Inputs.random(model.config, batch=2)
    for format in ("int8", "int4", "float8"):
        sampler, config = sampler_of(model), QuantizationConfig({"paligemma.embedding": format})
        formats = quantize(sampler, config)
        observation = inputs.observation.prompt_only()
        _, logits, _ = sampler.stages(observation, inputs.noise)["prefix"]()
        stages: dict[str, Tensor] = {}
        simulate(model, config, formats).sample_tokens(pi0_torch.to_device(observation), 3, stages=stages)
        assert logits.dtype == torch.float32
        assert distance(logits, stages["decoded_logits"][:, 0]) <= 0.02  # two orders of bfloat16's roundings


def test_every_weight_of_a_product_is_a_layer():
    """But for the constants of Euler steps and the actions' own projection, which is a product of two in π0."""
    for variant in (*VARIANTS, "tiny_pi0_fast"):
        model = random_model(get_variant(variant))
        sampler = sampler_of(model)
        layers = sampler_layers(sampler.weights)
        named = {id(layer[0]) for layer in layers.values()}
        left = {n for n, p in sampler.weights.named_parameters() if p.ndim == 2 and id(p) not in named}
        assert {name.rpartition(".")[0] for name in left} - {"vision.patches"} <= {
            *("action_in", "steps.bias", "steps.final_norm", "prefix_norms.final_norm"),
            *(f"{n}.{kind}.{i}" for n in ("steps", "prefix_norms") for kind in NORMS for i in range(3)),
        }
        assert layers.keys() - {"paligemma.embedding", "paligemma.output"} <= model_layers(model).keys()


NORMS = ("attention_norms", "mlp_norms")


def test_memory_is_less():
    model = random_model(get_variant("demo"))
    whole = stored_bytes(sampler_of(model).weights)
    shares = {}
    for format in ("bfloat16", "int8", "float8", "int4"):
        sampler = sampler_of(model)
        quantize(sampler, QuantizationConfig({"*": format}))
        shares[format] = stored_bytes(sampler.weights) / whole
    assert shares["int4"] < shares["int8"] == shares["float8"] < 0.3 < shares["bfloat16"] < 0.55, shares


def test_patterns_are_taken_in_order():
    model = random_model(get_variant("tiny"))
    sampler = sampler_of(model)
    config = QuantizationConfig({"*": "int8", "vision.*": "bfloat16", "*.mlp.down": "wide"})
    formats = quantize(sampler, config)
    assert formats["vision.layers.0.mlp.up"] == "bfloat16" and formats["vision.layers.0.mlp.down"] == "wide"
    assert formats["paligemma.layers.0.attention.qkv"] == "int8" and formats["action_out_proj"] == "int8"
    layers = sampler_layers(sampler.weights)
    assert isinstance(layers["action_expert.layers.1.mlp.down"][0], Tensor)
    assert layers["vision.layers.0.mlp.up"][0].values.dtype == torch.bfloat16


def test_the_largest_inputs_are_found():
    model = random_model(get_variant("tiny"))
    inputs = Inputs.random(model.config, batch=2)
    ranges = ranges_of(model, inputs)
    assert ranges.keys() == sampler_layers(sampler_of(model).weights).keys() - {"paligemma.embedding"}
    assert ranges["vision.patch_embedding"] == 1.0
    assert ranges["state_proj"] == pytest.approx(np.abs(inputs.observation.state).max())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_whole(how: Any):
    model = random_model(get_variant("tiny"))
    inputs, sampler = Inputs.random(model.config, batch=1), sampler_of(model)
    quantize(sampler, QuantizationConfig({"*": "int8", "action_expert.*": "int4"}))
    assert torch.equal(sample(how(sampler), inputs), sample(sampler, inputs))


def test_one_graph(monkeypatch: pytest.MonkeyPatch):
    """Traced whole, with programs that were made before it was quantized."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    model = random_model(get_variant("tiny", num_steps=1))
    inputs = Inputs.random(model.config, batch=1)
    ranges = {"action_expert.layers.0.mlp.down": 3.0}
    config = QuantizationConfig({"*": "int8", "vision.*": "int4", next(iter(ranges)): "w8a8"}, input_ranges=ranges)
    compiled, plain = Sampler(model, compile=True, warm_up=False), sampler_of(model)
    sample(compiled, inputs)
    for sampler in (compiled, plain):
        quantize(sampler, config)
    assert distance(sample(compiled, inputs), sample(plain, inputs)) <= FLOAT32


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            QuantizationConfig({"*": "int8", "language.*": "int4"}),
            ConfigError,
            "'language.*' matches none of the model's",
        ),
        (QuantizationConfig({"*": "w8a8"}), ConfigError, "needs the range of the inputs of vision.patch_embedding"),
        (QuantizationConfig({"*": "int8"}, input_ranges={"head": 1.0}), ConfigError, r"input_ranges has \['head'\]"),
        (
            QuantizationConfig({"vision.head": "w8a8_float8"}, input_ranges={"vision.head": 1.0}),
            ValueError,
            "multiplies in float8, which the CPU does not; use w8a8, or float8",
        ),
    ],
)
def test_errors_change_nothing(config: QuantizationConfig, error: type[Exception], message: str):
    sampler = sampler_of(random_model(get_variant("tiny")))
    before = {name: id(p) for name, p in sampler.weights.named_parameters()}
    with pytest.raises(error, match=message):
        quantize(sampler, config)
    assert {name: id(p) for name, p in sampler.weights.named_parameters()} == before


def test_it_is_quantized_once_and_guidance_needs_gradients():
    model = random_model(get_variant("tiny"))
    sampler, guided = sampler_of(model), sampler_of(model, rtc="guided")
    quantize(sampler, QuantizationConfig({"vision.head": "int8"}))
    with pytest.raises(ValueError, match=r"quantized already: vision\.head"):
        quantize(sampler, QuantizationConfig({"*": "int8"}))
    with pytest.raises(ValueError, match=r"action_out_proj is w8a8, and rounded inputs have no gradient"):
        quantize(guided, QuantizationConfig({"action_out_proj": "w8a8"}, input_ranges={"action_out_proj": 1.0}))
