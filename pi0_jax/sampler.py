"""Fast sampling of π0 and π0.5: the function of `models.pi0.Pi0.sample_actions`, laid out for speed.

`Sampler(model)` reads the plain model's parameters once. What does not depend on the observation is computed then:
fused projections, and for every Euler step the time's part of π0's action tokens or π0.5's scales, shifts and gates.
What nobody attends to is left out: cameras that are masked in every row, padding beyond the text's bucket, and all but
keys and values in the last layer of the prefix. One compiled program per shape does the rest, over a cache that is
allocated once with the suffix's place at its end. `TokenSampler(model)` is π0-FAST's, where the plain model has the
static cache already.

Axes: B batch, C cameras, S prefix tokens, T tokens of the suffix, G = N/K, R = T·G query rows of one key head, W width,
N heads, K key/value heads, H head dim, M mlp, L layers, A action dim, E Euler steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pi0 import numerics
from pi0.config import GemmaConfig, ModelConfig
from pi0.fetch import cache_dir
from pi0.observation import Observation
from pi0.policy.buckets import TEXT_BUCKETS, compact, placeholder, text_lengths
from pi0_jax.models.gemma import (
    AdaptiveRMSNorm,
    Expert,
    RMSNorm,
    Rotation,
    apply_rope,
    gated_residual,
    normalize,
    rotation,
)
from pi0_jax.models.layers import LayerNorm, Linear, cast, gelu
from pi0_jax.models.pi0 import Pi0, embed_time, suffix_blocks
from pi0_jax.models.pi0_fast import Pi0Fast
from pi0_jax.models.siglip import SigLIP
from pi0_jax.models.vision_language import VisionLanguageModel, attention_mask, pixels

Weights = dict[str, Any]
Modulation = tuple[Array, ...]  # of a norm: 1 + scale; of an adaptive norm shift and gate too
Cache = list[tuple[Float[Array, "B K S+T H"], Float[Array, "B K S+T H"]]]  # one entry per layer


class Sampler:
    """`model.sample_actions`, compiled, for `num_steps` (default: the config's) Euler steps.

    Prompts are cut to one of `text_buckets`. Compiled programs are kept for a restart (`use_compilation_cache`). With
    `warm_up`, programs for one robot with all cameras and any prompt are made now. The model is not needed afterwards.
    Raises ValueError for a model with LoRA, which is to be merged first.
    """

    def __init__(
        self,
        model: Pi0,
        *,
        num_steps: int | None = None,
        text_buckets: Sequence[int] = TEXT_BUCKETS,
        warm_up: bool = True,
    ):
        self.config, self.text_buckets = check_plain(model), text_buckets
        self.num_steps = model.config.runtime.num_steps if num_steps is None else num_steps
        use_compilation_cache()
        self.weights = jax.jit(lay_out, static_argnums=1)(model, self.num_steps)
        self.weights["embedding"] = model.paligemma.embedding[...]
        self._program = jax.jit(lambda weights, inputs: sample(weights, self.config, inputs))
        if warm_up:
            self.warm_up()

    def warm_up(self, batches: Sequence[int] = (1,), cameras: Sequence[int] | None = None) -> None:
        """Make the programs for these batch sizes and numbers of cameras (default: all of the model's), any prompt."""
        for batch in batches:
            for count in [len(self.config.image_keys)] if cameras is None else cameras:
                for length in text_lengths(self.config, self.text_buckets):
                    noise = np.zeros((batch, self.config.action_horizon, self.config.action_dim), np.float32)
                    jax.block_until_ready(self._run(placeholder(self.config, batch, count, length), noise))

    def sample(self, observation: Observation, noise: Float[Array | np.ndarray, "B T A"]) -> Float[Array, "B T A"]:
        """The actions, float32. An observation in NumPy is fastest. A new shape of it compiles once."""
        return self._run(compact(observation, self.config, self.text_buckets), noise)

    def _run(self, observation: Observation, noise: Float[Array | np.ndarray, "B T A"]) -> Float[Array, "B T A"]:
        return self._program(self.weights, self.inputs(observation, noise))

    def inputs(self, observation: Observation, noise: Float[Array | np.ndarray, "B T A"]) -> dict[str, Any]:
        """What the programs take: lists of the cameras that are there, so that their names make no other program."""
        return {
            "images": list(observation.images.values()),
            "image_masks": list(observation.image_masks.values()),
            "state": observation.state,
            "prompt": observation.tokenized_prompt,
            "prompt_mask": observation.tokenized_prompt_mask,
            "noise": noise,
        }


class TokenSampler:
    """`model.sample_tokens` of π0-FAST after prompts that are cut to one of `text_buckets`.

    Writes at most `max_decoding_steps` tokens (default: as many as the config says). Compiled, one program for each
    batch size and bucket. Raises ValueError for a model with LoRA, which is to be merged
    first.
    """

    def __init__(
        self,
        model: Pi0Fast,
        *,
        max_decoding_steps: int | None = None,
        text_buckets: Sequence[int] = TEXT_BUCKETS,
        eos_token: int = numerics.EOS_TOKEN,
    ):
        self.config, self.text_buckets = check_plain(model), text_buckets
        self.max_decoding_steps, self.eos_token = max_decoding_steps, eos_token
        use_compilation_cache()
        self.model = model
        self._program = jax.jit(lambda model, o: model.sample_tokens(o, max_decoding_steps, eos_token=eos_token))

    def sample(self, observation: Observation) -> Int[Array, "B D"]:
        """The tokens, int32. An observation in NumPy is fastest."""
        return self._program(self.model, compact(observation, self.config, self.text_buckets))


def use_compilation_cache() -> None:
    """Keep what JAX compiles for later processes, in the user's own cache folder, unless another one is set."""
    if getattr(jax.config, "jax_compilation_cache_dir") is None:  # noqa: B009 -- of settings mypy knows none
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))


def check_plain(model: VisionLanguageModel) -> ModelConfig:
    """The config of a model that can be laid out. Raises ValueError for LoRA."""
    config = model.config
    if any(gemma is not None and gemma.lora_rank is not None for gemma in (config.paligemma, config.action_expert)):
        raise ValueError("the model has LoRA, which costs time in every call; merge it: pi0-convert ... --lora merge")
    return config


def lay_out(model: Pi0, num_steps: int) -> Weights:
    """All parameters but the text embedding in the layout and the dtypes that `sample` reads."""
    pi0, paligemma = model.config.kind == "pi0", model.paligemma
    prefix = expert_weights(paligemma)
    queries = model.config.paligemma.num_heads * model.config.paligemma.head_dim
    prefix[-1] = {"qkv": (prefix[-1]["qkv"][0][:, queries:],)}  # nobody reads what the last layer's queries give
    return {
        "vision": vision_weights(model.vision),
        "prefix": prefix,
        "prefix_norms": norm_weights(paligemma, None, 1),
        "suffix": expert_weights(model.action_expert),
        "steps": step_weights(model, num_steps),
        "action_in": (action_in_weights(model),),
        "action_out": projection(model.action_out_proj),
        **({"state": projection(model.state_proj), "action_mix": projection(model.action_time_mlp_out)} if pi0 else {}),
    }


def vision_weights(vision: SigLIP) -> Weights:
    """The vision tower: patches as a matrix product, its bias within the position embedding; fused projections."""
    patches, layers = vision.patch_embedding, vision.layers
    attention, mlp = layers.attention, layers.mlp
    kernel, bias, position = (
        cast(p[...], "patches", vision.dtype) for p in (patches.kernel, patches.bias, vision.position_embedding)
    )
    stacked = {
        "attention_norm": layer_norm_weights(layers.attention_norm),
        "qkv": projection(attention.query, attention.key, attention.value, stacked=True),
        "out": projection(attention.out, stacked=True),
        "mlp_norm": layer_norm_weights(layers.mlp_norm),
        "up": projection(mlp.up, stacked=True),
        "down": projection(mlp.down, stacked=True),
    }
    return {
        "patches": (kernel.reshape(-1, kernel.shape[-1]), position + bias),
        "layers": unstack(stacked),
        "final_norm": layer_norm_weights(vision.final_norm),
        "head": projection(vision.head),
    }


def expert_weights(expert: Expert) -> list[Weights]:
    """The projections of each layer: query, key and value in one, and gate and up."""
    attention, mlp = expert.layers.attention, expert.layers.mlp
    stacked = {
        "qkv": projection(attention.query, attention.key, attention.value, stacked=True),
        "out": projection(attention.out, stacked=True),
        "gate_up": projection(mlp.gate, mlp.up, stacked=True),
        "down": projection(mlp.down, stacked=True),
    }
    return unstack(stacked)


def step_weights(model: Pi0, num_steps: int) -> Weights:
    """What each Euler step adds that no observation changes: leaves [E, ...]."""
    assert model.config.action_expert is not None
    embedded = embed_time(jnp.asarray(numerics.euler_times(num_steps)), model.config.action_expert.width)
    condition, bias = None, jnp.broadcast_to(projection(model.action_in_proj)[1], embedded.shape)
    if model.config.kind == "pi05":
        condition = jax.nn.silu(model.time_mlp_out(jax.nn.silu(model.time_mlp_in(embedded))))
    else:  # the time half of action_time_mlp_in
        bias = linear(jnp.concatenate([bias, embedded], axis=-1), *projection(model.action_time_mlp_in))
    return {"bias": (bias,), **norm_weights(model.action_expert, condition, num_steps)}


def norm_weights(expert: Expert, condition: Float[Array, "E W"] | None, num_steps: int) -> Weights:
    """An expert's norms in each step."""
    layers = expert.layers
    return {
        "attention_norms": unstack(modulation(layers.attention_norm, condition, num_steps), axis=1),
        "mlp_norms": unstack(modulation(layers.mlp_norm, condition, num_steps), axis=1),
        "final_norm": modulation(expert.final_norm, condition, num_steps),
    }


def action_in_weights(model: Pi0) -> Float[Array, "A W"]:
    """What actions are multiplied with: action_in_proj, with π0 together with the action half of action_time_mlp_in."""
    kernel = projection(model.action_in_proj)[0]
    if model.config.kind == "pi05":
        return kernel
    return jnp.matmul(kernel, projection(model.action_time_mlp_in)[0][: kernel.shape[-1]])


def modulation(norm: RMSNorm | AdaptiveRMSNorm, condition: Float[Array, "E W"] | None, num_steps: int) -> Modulation:
    """1 + scale and, of an adaptive norm, shift and gate of each step: [E, W], or [E, L, W] of a stack's norm."""
    if isinstance(norm, RMSNorm):
        scale = 1 + cast(norm.scale[...], "norm", norm.dtype)
        return (jnp.broadcast_to(scale, (num_steps, *scale.shape)),)
    assert condition is not None, "an adaptive norm needs a condition"
    kernel, bias = projection(norm.modulation, stacked=norm.modulation.kernel.ndim == 3)
    scale, shift, gate = jnp.split(jnp.moveaxis(linear(condition, kernel, bias[..., None, :]), -2, 0), 3, axis=-1)
    return 1 + cast(scale, "norm", norm.dtype), cast(shift, "norm", norm.dtype), gate


def projection(*linears: Linear, stacked: bool = False) -> tuple[Array, ...]:
    """Kernel [(L,) in, out] and bias [(L,) out], if any, of projections side by side, in their compute dtype."""
    dtype, kernels, biases = linears[0].dtype, [], []
    for one in linears:
        kernel = one.kernel[...]
        layers, inputs = kernel.shape[:stacked], kernel.shape[stacked : stacked + one.in_ndim]
        kernels.append(kernel.astype(dtype).reshape(*layers, int(np.prod(inputs)), -1))
        if one.bias is not None:
            biases.append(one.bias[...].astype(dtype).reshape(*layers, -1))
    return tuple(jnp.concatenate(parts, axis=-1) for parts in (kernels, biases) if parts)


def layer_norm_weights(norm: LayerNorm) -> tuple[Array, Array]:
    """Scale and bias."""
    return cast(norm.scale[...], "norm", norm.dtype), cast(norm.bias[...], "norm", norm.dtype)


def unstack(stacked: Any, axis: int = 0) -> list[Any]:
    """One entry per layer, so that no step of a loop has to copy a layer's weights out of the stack."""
    count = jax.tree.leaves(stacked)[0].shape[axis]
    return [jax.tree.map(lambda x: jnp.take(x, i, axis=axis), stacked) for i in range(count)]  # noqa: B023


def sample(weights: Weights, config: ModelConfig, inputs: Weights) -> Float[Array, "B T A"]:
    """Euler steps from `inputs["noise"]`; see `models.pi0.Pi0.sample_actions`, whose numbers these are."""
    x_t = inputs["noise"].astype(jnp.float32)
    prefix, valid = embed_prefix(weights, config, inputs)
    blocks = suffix_blocks(config.kind, x_t.shape[1])
    cache = fill_cache(weights, config, prefix, valid, room=len(blocks))
    positions = valid.sum(axis=1, keepdims=True) + np.arange(len(blocks))
    suffix_valid = jnp.ones((len(x_t), len(blocks)), bool)
    key_blocks = np.concatenate([np.zeros(prefix.shape[1], int), blocks])
    mask = attention_mask(blocks, key_blocks, suffix_valid, jnp.concatenate([valid, suffix_valid], axis=1))
    state = linear(inputs["state"], *weights["state"])[:, None] if config.kind == "pi0" else None
    turn, bias = rotation(positions, config.paligemma.head_dim), mask_bias(mask)
    time_step = np.float32(-1 / len(weights["steps"]["bias"][0]))

    def step(carry: tuple[Array, Cache], now: Weights) -> tuple[tuple[Array, Cache], None]:
        velocity, cache = denoise(weights, config, carry[1], state, carry[0], turn, bias, now)
        return (carry[0] + time_step * velocity, cache), None

    return jax.lax.scan(step, (x_t, cache), weights["steps"])[0][0]


def embed_prefix(
    weights: Weights, config: ModelConfig, inputs: Weights
) -> tuple[Float[Array, "B S W"], Bool[Array, "B S"]]:
    """Tokens of the cameras that are there, then of the prompt; and which of them are valid."""
    text = weights["embedding"][inputs["prompt"]].astype(config.runtime.dtype)
    text = text * jnp.sqrt(text.shape[-1]).astype(config.runtime.dtype)
    if not inputs["images"]:
        return text, inputs["prompt_mask"]
    tokens = embed_images(weights["vision"], config, jnp.stack([pixels(x) for x in inputs["images"]], axis=1))
    masks = jnp.repeat(jnp.stack(inputs["image_masks"], axis=1), config.image_tokens, axis=1)
    return jnp.concatenate([tokens, text], axis=1), jnp.concatenate([masks, inputs["prompt_mask"]], axis=1)


def embed_images(
    weights: Weights, config: ModelConfig, images: Float[Array, "B C height width 3"]
) -> Float[Array, "B S W"]:
    """All cameras in one pass of the vision tower."""
    patch, heads, (batch, cameras) = config.vision.patch_size, config.vision.num_heads, images.shape[:2]
    rows, columns = (size // patch for size in config.image_resolution)
    x = images.reshape(batch * cameras, rows, patch, columns, patch, 3).swapaxes(2, 3)
    x = linear(x.reshape(batch * cameras, rows * columns, -1), *weights["patches"]).astype(config.runtime.dtype)
    for w in weights["layers"]:
        qkv = linear(layer_norm(x, *w["attention_norm"]), *w["qkv"])
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, heads, -1), (2, 3), (0, 2))
        x = x + linear(attend(q, k, v, None).swapaxes(1, 2).reshape(x.shape), *w["out"])
        x = x + linear(gelu(linear(layer_norm(x, *w["mlp_norm"]), *w["up"])), *w["down"])
    x = linear(layer_norm(x, *weights["final_norm"]), *weights["head"])
    return x.reshape(batch, cameras * rows * columns, -1)


def fill_cache(
    weights: Weights, config: ModelConfig, x: Float[Array, "B S W"], valid: Bool[Array, "B S"], room: int
) -> Cache:
    """Keys and values of the prefix, with `room` for those of the suffix after them."""
    gemma, norms, cache = config.paligemma, at(weights["prefix_norms"], 0), []
    turn, bias = rotation(jnp.cumsum(valid, axis=1) - 1, gemma.head_dim), mask_bias(valid[:, None])
    for i, w in enumerate(weights["prefix"]):
        attention_norm, mlp_norm = norms["attention_norms"][i], norms["mlp_norms"][i]
        q, k, v = project(rms_norm(x, attention_norm), w, gemma, turn)
        pad = ((0, 0), (0, 0), (0, room), (0, 0))
        cache.append((jnp.pad(k, pad), jnp.pad(v, pad)))
        if i < gemma.depth - 1:
            x = finish_layer(x, attend(q, k, v, bias), w, gemma, attention_norm, mlp_norm)
    return cache


def denoise(
    weights: Weights,
    config: ModelConfig,
    cache: Cache,
    state: Float[Array, "B 1 W"] | None,
    x_t: Float[Array, "B T A"],
    turn: Rotation,
    bias: Float[Array, "B T S+T"],
    now: Weights,
) -> tuple[Float[Array, "B T A"], Cache]:
    """The velocity at `x_t` and the step whose weights are `now`; and the cache with the suffix in its place."""
    gemma = config.action_expert
    assert gemma is not None
    x = linear(x_t, *weights["action_in"], *now["bias"])
    if state is not None:
        x = jnp.concatenate([state, linear(jax.nn.silu(x), *weights["action_mix"])], axis=1)
    x, new_cache = x.astype(config.runtime.dtype), []
    for i, (w, cached) in enumerate(zip(weights["suffix"], cache, strict=True)):
        attention_norm, mlp_norm = now["attention_norms"][i], now["mlp_norms"][i]
        q, *new = project(rms_norm(x, attention_norm), w, gemma, turn)
        place = cached[0].shape[2] - x.shape[1]
        k, v = (jax.lax.dynamic_update_slice_in_dim(c, y, place, axis=2) for c, y in zip(cached, new, strict=True))
        new_cache.append((k, v))
        x = finish_layer(x, attend(q, k, v, bias), w, gemma, attention_norm, mlp_norm)
    return linear(rms_norm(x, now["final_norm"])[:, -x_t.shape[1] :], *weights["action_out"]), new_cache


def project(x: Float[Array, "B T W"], w: Weights, gemma: GemmaConfig, turn: Rotation) -> tuple[Array, Array, Array]:
    """Rotated queries [B, K, R, H] and keys [B, K, T, H], and values [B, K, T, H]."""
    batch, tokens, groups = *x.shape[:2], gemma.num_kv_heads
    heads = linear(x, *w["qkv"]).reshape(batch, tokens, -1, gemma.head_dim)
    rotated = apply_rope(heads[:, :, :-groups], turn, x.dtype.name)
    q = rotated[:, :, :-groups].reshape(batch, tokens, groups, -1, gemma.head_dim).swapaxes(1, 2)
    k, v = rotated[:, :, -groups:].swapaxes(1, 2), heads[:, :, -groups:].swapaxes(1, 2)
    return q.reshape(batch, groups, -1, gemma.head_dim), k, v


def attend(
    q: Float[Array, "B K R H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    bias: Float[Array, "B T S"] | None,
) -> Float[Array, "B K R H"]:
    """Attention; float32 logits and softmax, `v`'s dtype otherwise. A key head's queries are rows of one product."""
    accumulator = numerics.rounding("attention_logits", q.dtype.name)
    logits = jnp.einsum("BKRH,BKSH->BKRS", q, k, preferred_element_type=accumulator) * q.shape[-1] ** -0.5
    if bias is not None:
        shape = logits.shape
        logits = logits.reshape(*shape[:2], bias.shape[1], -1, shape[-1]) + bias[:, None, :, None]
        logits = logits.reshape(shape)
    probabilities = cast(jax.nn.softmax(logits, axis=-1), "attention_probabilities", v.dtype.name)
    return jnp.einsum("BKRS,BKSH->BKRH", probabilities, v)


def mask_bias(mask: Bool[Array, "B T S"]) -> Float[Array, "B T S"]:
    """What is added to logits: 0, or so much below 0 that it leaves nothing of a logit."""
    return jnp.where(mask, 0, jnp.float32(numerics.MASKED_LOGIT))


def finish_layer(
    x: Float[Array, "B T W"],
    attended: Float[Array, "B K R H"],
    w: Weights,
    gemma: GemmaConfig,
    attention_norm: Modulation,
    mlp_norm: Modulation,
) -> Float[Array, "B T W"]:
    """A layer from its attention on: output projection and MLP, each with its residual."""
    batch, tokens = x.shape[:2]
    attended = attended.reshape(batch, gemma.num_kv_heads, tokens, -1).swapaxes(1, 2).reshape(batch, tokens, -1)
    x = gated_residual(x, linear(attended, *w["out"]), gate_of(attention_norm))
    gate, up = jnp.split(linear(rms_norm(x, mlp_norm), *w["gate_up"]), 2, axis=-1)
    return gated_residual(x, linear(gelu(gate) * up, *w["down"]), gate_of(mlp_norm))


def at(norms: Any, step: int) -> Any:
    """Norms in one step."""
    return jax.tree.map(lambda x: x[step], norms)


def gate_of(norm: Modulation) -> Array | None:
    """The gate of an adaptive norm, None of a plain one."""
    return norm[2] if len(norm) == 3 else None


def rms_norm(x: Float[Array, "B T W"], norm: Modulation) -> Float[Array, "B T W"]:
    """RMS norm with scale, and shift where there is one, in float32, rounded to the dtype of `x`."""
    y = normalize(x, x.dtype.name) * norm[0]
    return (y if len(norm) == 1 else y + norm[1]).astype(x.dtype)


def layer_norm(x: Float[Array, "B S W"], scale: Float[Array, " W"], bias: Float[Array, " W"]) -> Float[Array, "B S W"]:
    """Layer norm in float32, rounded to the dtype of `x`."""
    y = cast(x, "norm", x.dtype.name)
    mean = y.mean(-1, keepdims=True)
    variance = jnp.square(y - mean).mean(-1, keepdims=True)
    return ((y - mean) * jax.lax.rsqrt(variance + numerics.LAYER_NORM_EPS) * scale + bias).astype(x.dtype)


def linear(x: Float[Array, "..."], kernel: Float[Array, "..."], bias: Array | None = None) -> Float[Array, "..."]:
    """x·kernel (+ bias) in the kernel's dtype, rounded once at the end."""
    x = x.astype(kernel.dtype)
    if bias is None:
        return jnp.matmul(x, kernel)
    return (jnp.matmul(x, kernel, preferred_element_type=jnp.float32) + bias).astype(kernel.dtype)
