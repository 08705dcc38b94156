"""Sampling for speed: the functions of the models' `sample` and `sample_with_subtask`, laid out for it.

`Sampler(model)` reads the model's parameters once. What does not depend on the observation is computed then: fused
projections, with LoRA merged, and for every Euler step the time's part of π0's action tokens or π0.5's scales, shifts
and gates. What is not attended to is left out: cameras that are masked in every row, padding beyond the text's bucket,
and all but keys and values in the last layer of a prefix that no text follows. One compiled program per shape does the
rest, over a cache that is allocated once, with the places of written tokens and of the suffix at its end.

Axes: B batch, C cameras, S prefix tokens, D written tokens, T tokens of the suffix, P places of the cache, G = N/K,
R = T·G query rows of one key head, W width, N heads, K key/value heads, H head dim, V vocabulary, A action dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pi0 import masks, numerics
from pi0.config import GemmaConfig, ModelConfig
from pi0.fetch import cache_dir
from pi0.observation import Observation
from pi0.policy.buckets import TEXT_BUCKETS, compact, placeholder, text_lengths
from pi0_jax.fused import Modulation, Weights, lay_out, linear
from pi0_jax.loading import Model
from pi0_jax.models.decoding import decode, written
from pi0_jax.models.gemma import Rotation, apply_rope, gated_residual, normalize, rotation
from pi0_jax.models.layers import cast, gelu
from pi0_jax.models.pi0_fast import SKIPPED_POSITIONS
from pi0_jax.models.vision_language import pixels

Cache = list[tuple[Float[Array, "B K P H"], Float[Array, "B K P H"]]]  # one entry per layer
Inputs = dict[str, Any]


class Sampler:
    """`model.sample`, compiled, for `num_steps` Euler steps or, of π0-FAST, at most as many tokens.

    `num_steps` defaults to the config's.
    With `subtasks`, π0.5 has `sample_with_subtask` too. Prompts are cut to one of `text_buckets`. Compiled programs are
    kept for a restart (`use_compilation_cache`). With `warm_up`, programs for one robot with all cameras and any prompt
    are made now. The model is not needed afterwards. Raises ValueError for subtasks of a
    model that writes none, and for another `attention` than "plain".
    """

    def __init__(
        self,
        model: Model,
        *,
        num_steps: int | None = None,
        text_buckets: Sequence[int] = TEXT_BUCKETS,
        eos_token: int = numerics.EOS_TOKEN,
        subtasks: bool = False,
        warm_up: bool = True,
    ):
        self.config, self.text_buckets, self.subtasks = model.config, text_buckets, subtasks
        tokens, runtime = self.config.family.action_tokens, self.config.runtime
        if subtasks and not self.config.family.recipe:
            raise ValueError(f"{self.config.family.title} writes no subtasks; leave subtasks out")
        if num_steps is None:
            num_steps = runtime.max_decoding_steps if tokens else runtime.num_steps
        if runtime.attention != "plain":
            raise ValueError(f"attention is {runtime.attention!r}; a sampler has its own: load the model with 'plain'")
        self.num_steps = num_steps
        use_compilation_cache()
        self.weights = jax.jit(lay_out, static_argnums=(1, 2))(model, num_steps, tokens or subtasks)
        self.weights["embedding"] = model.paligemma.embedding[...]
        steps = num_steps if tokens else runtime.max_decoding_steps
        decoding: dict[str, Any] = {"steps": steps, "eos_token": eos_token}
        programs: dict[str, Callable[..., Any]] = {
            "vision": embed_prefix,
            "prefix": read_prefix,
            "sample": partial(sample_tokens, **decoding) if tokens else sample_actions,
            "sample_with_subtask": partial(sample_with_subtask, **decoding),
        }
        self._programs = {name: jax.jit(partial(call, config=self.config)) for name, call in programs.items()}
        if warm_up:
            self.warm_up()

    def warm_up(self, batches: Sequence[int] = (1,), cameras: Sequence[int] | None = None) -> None:
        """Make the programs for these batch sizes and numbers of cameras (default: all of the model's), any prompt."""
        for batch in batches:
            for count in [len(self.config.image_keys)] if cameras is None else cameras:
                for length in text_lengths(self.config, self.text_buckets):
                    noise = np.zeros((batch, self.config.action_horizon, self.config.action_dim), np.float32)
                    inputs = self.inputs(placeholder(self.config, batch, count, length), noise)
                    jax.block_until_ready(self._programs["sample"](self.weights, inputs))
                    if self.subtasks:
                        subtask, _ = self._programs["sample_with_subtask"](self.weights, inputs)
                        jax.block_until_ready(
                            self._programs["sample_with_subtask"](
                                self.weights, inputs | {"subtask": np.asarray(subtask)}
                            )
                        )

    def sample(
        self, observation: Observation, noise: Float[Array | np.ndarray, "B T A"] | None = None
    ) -> Float[Array, "B T A"] | Int[Array, "B D"]:
        """Normalized actions, float32, or of π0-FAST tokens, int32, which takes no noise.

        An observation in NumPy is fastest. A new shape of it compiles once.
        """
        return self._run("sample", observation, noise)

    def sample_with_subtask(
        self,
        observation: Observation,
        noise: Float[Array | np.ndarray, "B T A"],
        subtask: Int[Array | np.ndarray, "B D"] | None = None,
    ) -> tuple[Int[Array, "B D"], Float[Array, "B T A"]]:
        """Write a subtask, unless it is given, and sample actions that attend to it; returns its tokens and them.

        Raises ValueError for a sampler without `subtasks`.
        """
        if not self.subtasks:
            raise ValueError("this sampler was made without subtasks; make it with subtasks=True")
        return self._run("sample_with_subtask", observation.prompt_only(), noise, subtask)

    def stages(
        self, observation: Observation, noise: Float[Array | np.ndarray, "B T A"] | None = None
    ) -> dict[str, Callable[[], Any]]:
        """The stages of `sample` before Euler steps or tokens: calls that compute all up to the end of each."""
        inputs = self.inputs(compact(observation, self.config, self.text_buckets), noise)
        return {name: partial(self._programs[name], self.weights, inputs) for name in ("vision", "prefix")}

    def _run(self, program: str, observation: Observation, *arrays: Any) -> Any:
        compacted = compact(observation, self.config, self.text_buckets)
        return self._programs[program](self.weights, self.inputs(compacted, *arrays))

    def inputs(
        self,
        observation: Observation,
        noise: Float[Array | np.ndarray, "B T A"] | None = None,
        subtask: Int[Array | np.ndarray, "B D"] | None = None,
    ) -> Inputs:
        """What the programs take: lists of the cameras that are there, so that their names make no other program."""
        inputs = {
            "images": list(observation.images.values()),
            "image_masks": list(observation.image_masks.values()),
            "state": observation.state,
            "prompt": observation.tokenized_prompt,
            "prompt_mask": observation.tokenized_prompt_mask,
            "noise": noise,
            "subtask": subtask,
        }
        return {name: value for name, value in inputs.items() if value is not None}


def use_compilation_cache() -> None:
    """Keep what JAX compiles for later processes, in the user's own cache folder, unless another one is set."""
    if getattr(jax.config, "jax_compilation_cache_dir") is None:  # noqa: B009 -- of settings mypy knows none
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))


def sample_actions(weights: Weights, inputs: Inputs, *, config: ModelConfig) -> Float[Array, "B T A"]:
    """Normalized actions; see `FlowModel.sample_actions`, to which it is numerically equivalent."""
    cache, _, seen = read_prefix(weights, inputs, config=config, room=suffix_length(inputs, config))
    return integrate(weights, inputs, cache, seen, config=config)


def sample_with_subtask(
    weights: Weights, inputs: Inputs, *, config: ModelConfig, steps: int, eos_token: int
) -> tuple[Int[Array, "B D"], Float[Array, "B T A"]]:
    """The subtask and the actions after it; see `Pi05.sample_with_subtask`."""
    subtask, suffix = inputs.get("subtask"), suffix_length(inputs, config)
    if subtask is None:
        cache, logits, seen = read_prefix(weights, inputs, config=config, room=steps + suffix)
        places = jnp.pad(seen, ((0, 0), (0, steps + suffix)))
        read = partial(read_token, weights, config=config)
        options: dict[str, Any] = {"read_last": True, "eos_token": eos_token}
        subtask, cache = decode(logits, cache, places, seen.shape[1], steps, read, **options)
        seen = jnp.concatenate([seen, written(subtask, eos_token)], axis=1)
    else:
        cache, _, seen = read_prefix(weights, inputs, config=config, room=suffix, eos_token=eos_token)
    return subtask, integrate(weights, inputs, cache, seen, config=config)


def sample_tokens(
    weights: Weights, inputs: Inputs, *, config: ModelConfig, steps: int, eos_token: int
) -> Int[Array, "B D"]:
    """Action tokens, greedily; see `Pi0Fast.sample_tokens`."""
    cache, logits, seen = read_prefix(weights, inputs, config=config, room=steps)
    places, read = jnp.pad(seen, ((0, 0), (0, steps))), partial(read_token, weights, config=config)
    options: dict[str, Any] = {"skipped": SKIPPED_POSITIONS, "eos_token": eos_token}
    return decode(logits, cache, places, seen.shape[1], steps, read, **options)[0]


def suffix_length(inputs: Inputs, config: ModelConfig) -> int:
    """Tokens of the suffix."""
    return config.family.state_tokens + inputs["noise"].shape[1]


def read_prefix(
    weights: Weights, inputs: Inputs, *, config: ModelConfig, room: int = 0, eos_token: int = numerics.EOS_TOKEN
) -> tuple[Cache, Any, Bool[Array, "B S"]]:
    """The cache of the prefix and a given subtask, with `room`; logits [B, V] of what follows; and valid tokens."""
    prefix, valid = embed_prefix(weights, inputs, config=config)
    mask, subtask = valid[:, None], inputs.get("subtask")
    if subtask is not None:
        groups = jnp.pad(jnp.full(subtask.shape, masks.SUBTASK), ((0, 0), (prefix.shape[1], 0)))
        prefix = jnp.concatenate([prefix, embed_text(weights, subtask, config)], axis=1)
        valid = jnp.concatenate([valid, written(subtask, eos_token)], axis=1)
        mask = masks.attention_mask(groups, valid)
    return *fill_cache(weights, prefix, mask, valid, config=config, room=room), valid


def integrate(
    weights: Weights, inputs: Inputs, cache: Cache, seen: Bool[Array, "B S"], *, config: ModelConfig
) -> Float[Array, "B T A"]:
    """Euler steps from the noise, attending to those places before the suffix that are `seen`."""
    x_t, suffix = inputs["noise"].astype(jnp.float32), suffix_length(inputs, config)
    blocks = np.repeat([0, 1, 2], [seen.shape[1], config.family.state_tokens, x_t.shape[1]])
    valid = jnp.concatenate([seen, jnp.ones((len(x_t), suffix), bool)], axis=1)
    bias = mask_bias(masks.block_mask(blocks, valid)[:, -suffix:])
    positions = seen.sum(axis=1, keepdims=True) + np.arange(suffix)
    rope = rotation(positions, config.paligemma.head_dim)
    state = linear(inputs["state"], *weights["state"])[:, None] if "state" in weights else None
    time_step = np.float32(-1 / len(weights["steps"]["bias"][0]))

    def step(carry: tuple[Array, Cache], now: Weights) -> tuple[tuple[Array, Cache], None]:
        velocity, cache = denoise(weights, config, carry[1], state, carry[0], rope, bias, now)
        return (carry[0] + time_step * velocity, cache), None

    return jax.lax.scan(step, (x_t, cache), weights["steps"])[0][0]


def embed_text(weights: Weights, tokens: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T W"]:
    """Text embeddings × sqrt(W)."""
    text = weights["embedding"][tokens].astype(config.runtime.dtype)
    return text * jnp.sqrt(text.shape[-1]).astype(config.runtime.dtype)


def embed_prefix(
    weights: Weights, inputs: Inputs, *, config: ModelConfig
) -> tuple[Float[Array, "B S W"], Bool[Array, "B S"]]:
    """Tokens of the cameras that are there, then of the prompt; and which of them are valid."""
    text = embed_text(weights, inputs["prompt"], config)
    if not inputs["images"]:
        return text, inputs["prompt_mask"]
    tokens = embed_images(weights["vision"], config, jnp.stack([pixels(x) for x in inputs["images"]], axis=1))
    image_masks = jnp.repeat(jnp.stack(inputs["image_masks"], axis=1), config.image_tokens, axis=1)
    return jnp.concatenate([tokens, text], axis=1), jnp.concatenate([image_masks, inputs["prompt_mask"]], axis=1)


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
    weights: Weights,
    x: Float[Array, "B S W"],
    mask: Bool[Array, "B S S"] | Bool[Array, "B 1 S"],
    valid: Bool[Array, "B S"],
    *,
    config: ModelConfig,
    room: int,
) -> tuple[Cache, Any]:
    """Keys and values of the prefix, with `room` for more after them; and the logits [B, V] of what follows, if any."""
    gemma, cache = config.paligemma, []
    rope, bias = rotation(jnp.cumsum(valid, axis=1) - 1, gemma.head_dim), mask_bias(mask)
    for w, attention_norm, mlp_norm in prefix_layers(weights):
        q, k, v = project(rms_norm(x, attention_norm), w, config, gemma, rope)
        pad = ((0, 0), (0, 0), (0, room), (0, 0))
        cache.append((jnp.pad(k, pad), jnp.pad(v, pad)))
        if "out" in w:
            x = finish_layer(x, attend(q, k, v, bias), w, gemma, attention_norm, mlp_norm)
    if "out" not in w:
        return cache, None
    last = jnp.argmax(jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, -1), axis=1)
    return cache, read_logits(weights, x[jnp.arange(len(x)), last][:, None])


def read_token(
    weights: Weights,
    token: Int[Array, "B 1"],
    position: Int[Array, "B 1"],
    seen: Bool[Array, "B P"],
    slot: Int[Array, ""],
    cache: Cache,
    *,
    config: ModelConfig,
) -> tuple[Float[Array, "B V"], Cache]:
    """The logits of the next token, and the cache with this one in its place."""
    x, gemma, new_cache = embed_text(weights, token, config), config.paligemma, []
    rope, bias = rotation(position, gemma.head_dim), mask_bias(seen[:, None])
    for (w, attention_norm, mlp_norm), cached in zip(prefix_layers(weights), cache, strict=True):
        q, *new = project(rms_norm(x, attention_norm), w, config, gemma, rope)
        k, v = (jax.lax.dynamic_update_slice_in_dim(c, y, slot, axis=2) for c, y in zip(cached, new, strict=True))
        new_cache.append((k, v))
        x = finish_layer(x, attend(q, k, v, bias), w, gemma, attention_norm, mlp_norm)
    return read_logits(weights, x), new_cache


def prefix_layers(weights: Weights) -> list[tuple[Weights, Modulation, Modulation]]:
    """The language model's layers: projections and norms."""
    norms = at(weights["prefix_norms"], 0)
    return list(zip(weights["prefix"], norms["attention_norms"], norms["mlp_norms"], strict=True))


def read_logits(weights: Weights, x: Float[Array, "B 1 W"]) -> Float[Array, "B V"]:
    """The vocabulary's logits, float32."""
    out = rms_norm(x, at(weights["prefix_norms"]["final_norm"], 0))
    return jnp.matmul(out, weights["embedding"].T).astype(jnp.float32)[:, 0]


def denoise(
    weights: Weights,
    config: ModelConfig,
    cache: Cache,
    state: Float[Array, "B 1 W"] | None,
    x_t: Float[Array, "B T A"],
    rope: Rotation,
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
        q, *new = project(rms_norm(x, attention_norm), w, config, gemma, rope)
        place = cached[0].shape[2] - x.shape[1]
        k, v = (jax.lax.dynamic_update_slice_in_dim(c, y, place, axis=2) for c, y in zip(cached, new, strict=True))
        new_cache.append((k, v))
        x = finish_layer(x, attend(q, k, v, bias), w, gemma, attention_norm, mlp_norm)
    return linear(rms_norm(x, now["final_norm"])[:, -x_t.shape[1] :], *weights["action_out"]), new_cache


def project(
    x: Float[Array, "B T W"], w: Weights, config: ModelConfig, gemma: GemmaConfig, rope: Rotation
) -> tuple[Array, Array, Array]:
    """Rotated queries [B, K, R, H] and keys [B, K, T, H], and values [B, K, T, H]."""
    batch, tokens, groups = *x.shape[:2], gemma.num_kv_heads
    heads = linear(x, *w["qkv"]).reshape(batch, tokens, -1, gemma.head_dim)
    rotated = apply_rope(heads[:, :, :-groups], rope, numerics.rounding(config.family.query_rounding, x.dtype.name))
    q = rotated[:, :, :-groups].reshape(batch, tokens, groups, -1, gemma.head_dim).swapaxes(1, 2)
    k, v = rotated[:, :, -groups:].astype(x.dtype).swapaxes(1, 2), heads[:, :, -groups:].swapaxes(1, 2)
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
