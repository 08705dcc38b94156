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

import dataclasses
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
from pi0.policy.rtc import RTC, Previous
from pi0.recording import record
from pi0_jax.attention import attend, attend_suffix
from pi0_jax.fused import Modulation, Weights, at, finish_layer, lay_out, layer_norm, linear, rms_norm
from pi0_jax.loading import Model
from pi0_jax.models.decoding import decode, written
from pi0_jax.models.gemma import Rotation, apply_rope, rotation
from pi0_jax.models.layers import cast, gelu
from pi0_jax.models.lora import at_least_float32
from pi0_jax.models.rtc import clamp, given_actions, guided_velocity
from pi0_jax.models.vision_language import pixels

Cache = list[tuple[Float[Array, "B K P H"], Float[Array, "B K P H"]]]  # one entry per layer
Inputs = dict[str, Any]


class Sampler:
    """`model.sample`, compiled, for `num_steps` Euler steps or, of π0-FAST, at most as many tokens.

    `num_steps` defaults to the config's. With `subtasks`, π0.5 has `sample_with_subtask` too. With `rtc`, actions go on
    from those of a previous chunk. Prompts are cut to one of
    `text_buckets`. Compiled programs are kept for a restart (`use_compilation_cache`). With `warm_up`, programs for one
    robot with all cameras and any prompt are made now.

    The model is not needed afterwards: the sampler is a snapshot, and later changes of the model do not reach it.
    Copies and pickles of it are whole; they compile anew. Raises ValueError for subtasks of a model that writes none,
    and for another `attention` than "plain".
    """

    def __init__(
        self,
        model: Model,
        *,
        num_steps: int | None = None,
        text_buckets: Sequence[int] = TEXT_BUCKETS,
        eos_token: int = numerics.EOS_TOKEN,
        subtasks: bool = False,
        rtc: RTC | str | None = None,
        warm_up: bool = True,
    ):
        self.config, self.text_buckets, self.subtasks = model.config, text_buckets, subtasks
        tokens, runtime = self.config.family.action_tokens, self.config.runtime
        if subtasks and not self.config.family.recipe:
            raise ValueError(f"{self.config.family.title} writes no subtasks; leave subtasks out")
        self.rtc = RTC.of(rtc)
        if self.rtc and tokens:
            raise ValueError(f"{self.config.family.title} decodes tokens: real-time chunking is for flow matching")
        if num_steps is None:
            num_steps = runtime.max_decoding_steps if tokens else runtime.num_steps
        if runtime.attention != "plain":
            raise ValueError(f"attention is {runtime.attention!r}; a sampler has its own: load the model with 'plain'")
        self.num_steps, self.eos_token = num_steps, eos_token
        given = self.rtc is not None and self.rtc.method == "trained"
        self.weights = jax.jit(lay_out, static_argnums=(1, 2, 3))(model, num_steps, tokens or subtasks, given)
        self.weights["embedding"] = model.paligemma.embedding[...]
        if not self.config.tied_output:
            self.weights["output"] = model.paligemma.output[...]
        self._make_programs()
        if warm_up:
            self.warm_up()

    def _make_programs(self) -> None:
        use_compilation_cache()
        self._fused = FusedModel(self.weights, self.config, self.rtc)
        tokens, most = self.config.family.action_tokens, self.config.runtime.max_decoding_steps
        decoding: dict[str, Any] = {"steps": self.num_steps if tokens else most, "eos_token": self.eos_token}
        write, act = partial(FusedModel.sample_tokens, **decoding), FusedModel.sample_actions
        programs: dict[str, Callable[..., Any]] = {
            "vision": FusedModel.embed_prefix,
            "prefix": FusedModel.read_prefix,
            "sample": write if tokens else act,
            "sample_with_subtask": partial(FusedModel.sample_with_subtask, **decoding),
        }
        self._programs = {name: jax.jit(program) for name, program in programs.items()}

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: all but the programs, which they make for themselves."""
        return {name: value for name, value in vars(self).items() if name not in ("_fused", "_programs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_programs()

    def warm_up(self, batches: Sequence[int] = (1,), cameras: Sequence[int] | None = None) -> None:
        """Make the programs for these batch sizes and numbers of cameras (default: all of the model's), any prompt."""
        for batch in batches:
            for count in [len(self.config.image_keys)] if cameras is None else cameras:
                for length in text_lengths(self.config, self.text_buckets):
                    noise = np.zeros((batch, self.config.action_horizon, self.config.action_dim), np.float32)
                    inputs = self.inputs(placeholder(self.config, batch, count, length), noise)
                    jax.block_until_ready(self._programs["sample"](self._fused, inputs))
                    if self.subtasks:
                        with_subtask = partial(self._programs["sample_with_subtask"], self._fused)
                        given = inputs | {"subtask": np.asarray(with_subtask(inputs)[0])}
                        jax.block_until_ready(with_subtask(given))

    def sample(
        self,
        observation: Observation,
        noise: Float[Array | np.ndarray, "B T A"] | None = None,
        previous: Previous | None = None,
    ) -> Float[Array, "B T A"] | Int[Array, "B D"]:
        """Normalized actions, float32, or of π0-FAST tokens, int32, which takes no noise.

        A sampler with `rtc` goes on from a `previous` chunk. An observation in NumPy is fastest. A new shape of it
        compiles once.
        """
        return self._run("sample", observation, noise, None, previous)

    def sample_with_subtask(
        self,
        observation: Observation,
        noise: Float[Array | np.ndarray, "B T A"],
        subtask: Int[Array | np.ndarray, "B D"] | None = None,
        previous: Previous | None = None,
    ) -> tuple[Int[Array, "B D"], Float[Array, "B T A"]]:
        """Write a subtask, unless it is given, and sample actions that attend to it; returns its tokens and them.

        Raises ValueError for a sampler without `subtasks`.
        """
        if not self.subtasks:
            raise ValueError("this sampler was made without subtasks; make it with subtasks=True")
        return self._run("sample_with_subtask", observation.prompt_only(), noise, subtask, previous)

    def stages(
        self, observation: Observation, noise: Float[Array | np.ndarray, "B T A"] | None = None
    ) -> dict[str, Callable[[], Any]]:
        """The stages of `sample` before Euler steps or tokens: calls that compute all up to the end of each."""
        inputs = self.inputs(compact(observation, self.config, self.text_buckets), noise)
        return {name: partial(self._programs[name], self._fused, inputs) for name in ("vision", "prefix")}

    def _run(self, program: str, observation: Observation, *arrays: Any) -> Any:
        compacted = compact(observation, self.config, self.text_buckets)
        return self._programs[program](self._fused, self.inputs(compacted, *arrays))

    def inputs(
        self,
        observation: Observation,
        noise: Float[Array | np.ndarray, "B T A"] | None = None,
        subtask: Int[Array | np.ndarray, "B D"] | None = None,
        previous: Previous | None = None,
    ) -> Inputs:
        """What the programs take: lists of the cameras that are there, so that their names make no other program.

        Raises ValueError for a previous chunk where the sampler was made without `rtc`.
        """
        if self.rtc is None and previous is not None:
            raise ValueError("this sampler was made without rtc, and takes no previous chunk")
        if self.rtc is not None and noise is not None and previous is None:
            previous = Previous.none(*np.shape(noise))
        inputs = {
            "images": list(observation.images.values()),
            "image_masks": list(observation.image_masks.values()),
            "state": observation.state,
            "prompt": observation.tokenized_prompt,
            "prompt_mask": observation.tokenized_prompt_mask,
            "noise": noise,
            "subtask": subtask,
            "previous": previous,
        }
        return {name: value for name, value in inputs.items() if value is not None}


def use_compilation_cache() -> None:
    """Keep what JAX compiles for later processes, in the user's own cache folder, unless another one is set."""
    if getattr(jax.config, "jax_compilation_cache_dir") is None:  # noqa: B009 -- of settings mypy knows none
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))


@partial(jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["config", "rtc"])
@dataclasses.dataclass(frozen=True, eq=False)
class FusedModel:
    """The stages of sampling over `weights` of `lay_out`."""

    weights: Weights
    config: ModelConfig
    rtc: RTC | None = None

    def sample_actions(self, inputs: Inputs) -> Float[Array, "B T A"]:
        """Normalized actions; see `FlowModel.sample_actions`, to which it is numerically equivalent."""
        cache, _, seen = self.read_prefix(inputs, room=self.suffix_length(inputs))
        return self.integrate(inputs, cache, seen)

    def sample_with_subtask(
        self, inputs: Inputs, *, steps: int, eos_token: int
    ) -> tuple[Int[Array, "B D"], Float[Array, "B T A"]]:
        """The subtask and the actions after it; see `Pi05.sample_with_subtask`."""
        subtask, suffix = inputs.get("subtask"), self.suffix_length(inputs)
        if subtask is None:
            cache, logits, seen = self.read_prefix(inputs, room=steps + suffix)
            places = jnp.pad(seen, ((0, 0), (0, steps + suffix)))
            options: dict[str, Any] = {"read_last": True, "eos_token": eos_token}
            subtask, cache = decode(logits, cache, places, seen.shape[1], steps, self.read_token, **options)
            seen = jnp.concatenate([seen, written(subtask, eos_token)], axis=1)
        else:
            cache, _, seen = self.read_prefix(inputs, room=suffix, eos_token=eos_token)
        return subtask, self.integrate(inputs, cache, seen)

    def sample_tokens(self, inputs: Inputs, *, steps: int, eos_token: int) -> Int[Array, "B D"]:
        """Action tokens, greedily; see `Pi0Fast.sample_tokens`."""
        cache, logits, seen = self.read_prefix(inputs, room=steps)
        places = jnp.pad(seen, ((0, 0), (0, steps)))
        options: dict[str, Any] = {"skipped": self.config.format.skipped_positions, "eos_token": eos_token}
        return decode(logits, cache, places, seen.shape[1], steps, self.read_token, **options)[0]

    def suffix_length(self, inputs: Inputs) -> int:
        """Tokens of the suffix."""
        return self.config.family.state_tokens + inputs["noise"].shape[1]

    def read_prefix(
        self, inputs: Inputs, room: int = 0, eos_token: int = numerics.EOS_TOKEN
    ) -> tuple[Cache, Any, Bool[Array, "B S"]]:
        """The cache of the prefix and a given subtask, with `room`; logits [B, V] of what follows; and valid tokens."""
        prefix, valid = self.embed_prefix(inputs)
        mask, subtask = valid[:, None], inputs.get("subtask")
        if subtask is not None:
            groups = jnp.pad(jnp.full(subtask.shape, masks.SUBTASK), ((0, 0), (prefix.shape[1], 0)))
            prefix = jnp.concatenate([prefix, self.embed_text(subtask)], axis=1)
            valid = jnp.concatenate([valid, written(subtask, eos_token)], axis=1)
            mask = masks.attention_mask(groups, valid)
        return *self.fill_cache(prefix, mask, valid, room), valid

    def integrate(self, inputs: Inputs, cache: Cache, seen: Bool[Array, "B S"]) -> Float[Array, "B T A"]:
        """Euler steps from the noise, attending to those places before the suffix that are `seen`."""
        dtype, suffix = self.config.runtime.dtype, self.suffix_length(inputs)
        x_t = cast(inputs["noise"], "action_projections", dtype)
        blocks = np.repeat([1, 2], [self.config.family.state_tokens, x_t.shape[1]])
        valid = jnp.concatenate([seen, jnp.ones((x_t.shape[0], suffix), bool)], axis=1)
        bias = mask_bias(masks.block_mask(jnp.pad(blocks, (seen.shape[1], 0)), valid, suffix))
        positions = seen.sum(axis=1, keepdims=True) + np.arange(suffix)
        rope, weights = rotation(positions, self.config.paligemma.head_dim, dtype), self.weights
        state = linear(inputs["state"], *weights["state"])[:, None] if "state" in weights else None
        num_steps, previous = len(weights["steps"]["bias"][0]), inputs.get("previous")
        given = given_actions(self.rtc, previous)

        def step(carry: tuple[Array, Cache], now: tuple[Weights, Array, Array]) -> tuple[tuple[Array, Cache], None]:
            (x_t, cache), (step_weights, time, scale) = carry, now

            def denoise(x_t: Array) -> tuple[Array, Cache]:
                return self.denoise(cache, state, x_t, rope, bias, step_weights, given)

            if self.rtc is None or given is not None:
                velocity, cache = denoise(x_t)
            else:  # not in the cache's place, since what is there is needed once more for the gradient
                velocity = guided_velocity(lambda x: denoise(x)[0], x_t, time, scale, self.rtc, previous)
            return (clamp(x_t + np.float32(-1 / num_steps) * velocity, given, previous), cache), None

        times = numerics.euler_times(num_steps)
        steps = (weights["steps"], jnp.asarray(times), jnp.asarray((self.rtc or RTC()).scales(times)))
        return jax.lax.scan(step, (clamp(x_t, given, previous), cache), steps)[0][0]

    def embed_text(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T W"]:
        """Text embeddings × sqrt(W)."""
        text = self.weights["embedding"][tokens].astype(self.config.runtime.dtype)
        return text * jnp.sqrt(text.shape[-1]).astype(self.config.runtime.dtype)

    def embed_prefix(self, inputs: Inputs) -> tuple[Float[Array, "B S W"], Bool[Array, "B S"]]:
        """Tokens of the cameras that are there, then of the prompt; and which of them are valid."""
        text = self.embed_text(inputs["prompt"])
        if not inputs["images"]:
            return text, inputs["prompt_mask"]
        tokens = self.embed_images(jnp.stack([pixels(x, self.config.runtime.dtype) for x in inputs["images"]], axis=1))
        image_masks = jnp.repeat(jnp.stack(inputs["image_masks"], axis=1), self.config.image_tokens, axis=1)
        return jnp.concatenate([tokens, text], axis=1), jnp.concatenate([image_masks, inputs["prompt_mask"]], axis=1)

    def embed_images(self, images: Float[Array, "B C height width 3"]) -> Float[Array, "B S W"]:
        """All cameras in one pass of the vision tower."""
        vision, weights, (batch, cameras) = self.config.vision, self.weights["vision"], images.shape[:2]
        patch, heads = vision.patch_size, vision.num_heads
        rows, columns = (size // patch for size in self.config.image_resolution)
        x = images.reshape(batch * cameras, rows, patch, columns, patch, 3).swapaxes(2, 3)
        x = linear(x.reshape(batch * cameras, rows * columns, -1), *weights["patches"])
        x = x.astype(self.config.runtime.dtype)
        for w in weights["layers"]:
            dtype, x = x.dtype, cast(x, "residual", x.dtype.name)
            qkv = linear(layer_norm(x, *w["attention_norm"]), *w["qkv"])
            q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, heads, -1), (2, 3), (0, 2))
            x = x + linear(attend(q, k, v, None).swapaxes(1, 2).reshape(x.shape), *w["out"])
            x = x + linear(gelu(linear(layer_norm(x, *w["mlp_norm"]), *w["up"])), *w["down"])
            x = record("vision layer", x.astype(dtype))
        x = linear(layer_norm(x, *weights["final_norm"]), *weights["head"])
        return record("image tokens", x.reshape(batch, cameras * rows * columns, -1))

    def fill_cache(
        self,
        x: Float[Array, "B S W"],
        mask: Bool[Array, "B S S"] | Bool[Array, "B 1 S"],
        valid: Bool[Array, "B S"],
        room: int,
    ) -> tuple[Cache, Any]:
        """Keys and values of the prefix, with `room` after them; and the logits [B, V] of what follows, if any."""
        gemma, cache = self.config.paligemma, []
        rope, bias = rotation(jnp.cumsum(valid, axis=1) - 1, gemma.head_dim, x.dtype.name), mask_bias(mask)
        x = record("prefix tokens", x)
        for w, attention_norm, mlp_norm in self.prefix_layers():
            q, k, v = self.project(rms_norm(x, attention_norm), w, gemma, rope)
            k, v = record("prefix keys", k), record("prefix values", v)
            pad = ((0, 0), (0, 0), (0, room), (0, 0))
            cache.append((jnp.pad(k, pad), jnp.pad(v, pad)))
            if "out" in w:
                x = finish_layer(x, attend(q, k, v, bias), w, gemma, attention_norm, mlp_norm)
                x = record("prefix layer", x)
        if "out" not in w:
            return cache, None
        last = jnp.argmax(jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, -1), axis=1)
        return cache, self.read_logits(x[jnp.arange(x.shape[0]), last][:, None])

    def read_token(
        self,
        token: Int[Array, "B 1"],
        position: Int[Array, "B 1"],
        seen: Bool[Array, "B P"],
        slot: Int[Array, ""],
        cache: Cache,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """The logits of the next token, and the cache with this one in its place."""
        x, gemma, new_cache = self.embed_text(token), self.config.paligemma, []
        rope, bias = rotation(position, gemma.head_dim, x.dtype.name), mask_bias(seen[:, None])
        for (w, attention_norm, mlp_norm), cached in zip(self.prefix_layers(), cache, strict=True):
            q, *new = self.project(rms_norm(x, attention_norm), w, gemma, rope)
            k, v = (jax.lax.dynamic_update_slice_in_dim(c, y, slot, axis=2) for c, y in zip(cached, new, strict=True))
            new_cache.append((k, v))
            x = finish_layer(x, attend(q, k, v, bias), w, gemma, attention_norm, mlp_norm)
        return self.read_logits(x), new_cache

    def prefix_layers(self) -> list[tuple[Weights, Modulation, Modulation]]:
        """The language model's layers: projections and norms."""
        norms = at(self.weights["prefix_norms"], 0)
        return list(zip(self.weights["prefix"], norms["attention_norms"], norms["mlp_norms"], strict=True))

    def read_logits(self, x: Float[Array, "B 1 W"]) -> Float[Array, "B V"]:
        """The vocabulary's logits, float32."""
        out = rms_norm(x, at(self.weights["prefix_norms"]["final_norm"], 0))
        output = self.weights["embedding" if self.config.tied_output else "output"]
        return at_least_float32(jnp.matmul(out, output.T))[:, 0]

    def denoise(
        self,
        cache: Cache,
        state: Float[Array, "B 1 W"] | None,
        x_t: Float[Array, "B T A"],
        rope: Rotation,
        bias: Float[Array, "B T S+T"],
        now: Weights,
        given: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T A"], Cache]:
        """The velocity at `x_t` and the step whose weights are `now`; and the cache with the suffix in its place.

        Actions `given` as they are have the weights of t = 0.
        """
        gemma, weights = self.config.action_expert, self.weights
        assert gemma is not None
        if given is not None:
            now = now | jax.tree.map(
                partial(jnp.where, given[..., None]), weights["given"], {k: now[k] for k in weights["given"]}
            )
        x = linear(x_t, *weights["action_in"], *now["bias"])
        if state is not None:
            x = jnp.concatenate([state, linear(jax.nn.silu(x), *weights["action_mix"])], axis=1)
        x, new_cache = cast(x, "action_residual", self.config.runtime.dtype), []
        for i, (w, cached) in enumerate(zip(weights["suffix"], cache, strict=True)):
            attention_norm, mlp_norm = now["attention_norms"][i], now["mlp_norms"][i]
            q, *new = self.project(rms_norm(x, attention_norm), w, gemma, rope)
            place = cached[0].shape[2] - x.shape[1]
            k, v = (jax.lax.dynamic_update_slice_in_dim(c, y, place, axis=2) for c, y in zip(cached, new, strict=True))
            new_cache.append((k, v))
            x = finish_layer(x, attend_suffix(q, k, v, bias, *new), w, gemma, attention_norm, mlp_norm)
        return linear(rms_norm(x, now["final_norm"])[:, -x_t.shape[1] :], *weights["action_out"]), new_cache

    def project(
        self, x: Float[Array, "B T W"], w: Weights, gemma: GemmaConfig, rope: Rotation
    ) -> tuple[Array, Array, Array]:
        """Rotated queries [B, K, R, H] and keys [B, K, T, H], and values [B, K, T, H]."""
        groups, (batch, tokens) = gemma.num_kv_heads, x.shape[:2]
        heads = linear(x, *w["qkv"]).reshape(batch, tokens, -1, gemma.head_dim)
        rounding = numerics.rounding(self.config.family.query_rounding, heads.dtype.name)
        rotated = apply_rope(heads[:, :, :-groups], rope, rounding)
        q = rotated[:, :, :-groups].reshape(batch, tokens, groups, -1, gemma.head_dim).swapaxes(1, 2)
        k, v = rotated[:, :, -groups:].astype(heads.dtype).swapaxes(1, 2), heads[:, :, -groups:].swapaxes(1, 2)
        return q.reshape(batch, groups, -1, gemma.head_dim), k, v


def mask_bias(mask: Bool[Array, "B T S"]) -> Float[Array, "B T S"]:
    """What is added to logits: 0, or so much below 0 that it leaves nothing of a logit."""
    return jnp.where(mask, 0, jnp.float32(numerics.MASKED_LOGIT))
