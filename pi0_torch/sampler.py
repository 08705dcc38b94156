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

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pi0 import masks, numerics
from pi0.config import GemmaConfig, ModelConfig
from pi0.observation import Observation
from pi0.policy.buckets import TEXT_BUCKETS, compact, placeholder, text_lengths
from pi0.policy.rtc import RTC, Previous
from pi0.recording import record, section
from pi0_torch.attention import Attend, attention_backend, flash_attention, pad_left, sdpa_attention
from pi0_torch.fused import Modulation, Weights, at, finish_layer, lay_out, layer_norm, linear, rms_norm
from pi0_torch.loading import Model
from pi0_torch.models.decoding import decode, written
from pi0_torch.models.gemma import Rotation, apply_rope, rotation
from pi0_torch.models.layers import cast, dtype_name, gelu
from pi0_torch.models.lora import at_least_float32
from pi0_torch.models.rtc import clamp, given_actions, guided_velocity
from pi0_torch.models.vision_language import pixels
from pi0_torch.quantization import rows, wider_linear

Cache = list[tuple[Float[Tensor, "B K P H"], Float[Tensor, "B K P H"]]]  # one entry per layer
Inputs = dict[str, Any]


class Sampler:
    """`model.sample`, compiled, for `num_steps` Euler steps or, of π0-FAST, at most as many tokens.

    `num_steps` defaults to the config's. With `subtasks`, π0.5 has `sample_with_subtask` too. With `rtc`, actions go on
    from those of a previous chunk. Prompts are cut to one of `text_buckets`. `attention` is one of `ATTENTION`, see
    `attention_backend`. `compile` makes one graph of each shape of input (default: on a GPU), in `mode` of
    `torch.compile` (default on a GPU: "reduce-overhead", CUDA graphs; text is written without them); without it, every
    operation runs by itself, which a debugger can follow. With `warm_up`, graphs for one robot with all cameras and any
    prompt are made now. What `kept`, a narrower dtype, holds exactly of the weights is stored in it.

    The model is not needed afterwards: the sampler is a snapshot, with tensors of its own, and later changes of the
    model do not reach it. Copies and pickles of it are whole; they compile anew. Raises ValueError for subtasks of a
    model that writes none, and for an attention that is unknown or not available.
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
        attention: str | None = None,
        compile: bool | None = None,
        mode: str | None = None,
        warm_up: bool = True,
        kept: torch.dtype | None = None,
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
        self.num_steps, self.eos_token, self.device = num_steps, eos_token, model.paligemma.embedding.device
        cuda = self.device.type == "cuda"
        self.compile = cuda if compile is None else compile
        self._attend = attention_backend(attention, self.config, self.device, compiled=self.compile)
        self.mode = "reduce-overhead" if mode is None and cuda else mode
        given = self.rtc is not None and self.rtc.method == "trained"
        self.weights = lay_out(model, num_steps, tokens or subtasks, given, kept)
        self._make_programs()
        if warm_up:
            self.warm_up()

    def _make_programs(self) -> None:
        self._fused, text = (FusedModel(self.weights, self.config, self._attend, self.rtc) for _ in range(2))
        for name in ("read_prefix", "read_token", "integrate"):
            # Text is written to a cache that the next call reads: no CUDA graphs, which reuse the memory of results.
            setattr(text, name, self._compiled(getattr(text, name), None))
        tokens, most = self.config.family.action_tokens, self.config.runtime.max_decoding_steps
        decoding: dict[str, Any] = {"steps": self.num_steps if tokens else most, "eos_token": self.eos_token}
        act = self._compiled(self._fused.sample_actions, self.mode)
        self._programs: dict[str, Callable[..., Any]] = {
            "sample": partial(text.sample_tokens, **decoding) if tokens else act,
            "sample_with_subtask": partial(text.sample_with_subtask, **decoding),
        }

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: all but the programs, which they make for themselves."""
        return {name: value for name, value in vars(self).items() if name not in ("_fused", "_programs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_programs()

    def _compiled(self, function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
        if not self.compile:
            return function
        torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)  # shapes; else 8
        return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    @torch.no_grad()
    def warm_up(self, batches: Sequence[int] = (1,), cameras: Sequence[int] | None = None) -> None:
        """Make the programs for these batch sizes and numbers of cameras (default: all of the model's), any prompt."""
        for batch in batches:
            for count in [len(self.config.image_keys)] if cameras is None else cameras:
                for length in text_lengths(self.config, self.text_buckets):
                    noise = np.zeros((batch, self.config.action_horizon, self.config.action_dim), np.float32)
                    inputs = self.inputs(placeholder(self.config, batch, count, length), noise)
                    for _ in range(3 if self.compile else 1):  # CUDA graphs are recorded in the second call
                        self._programs["sample"](inputs)
                    if self.subtasks:
                        subtask, _ = self._programs["sample_with_subtask"](inputs)
                        self._programs["sample_with_subtask"](inputs | {"subtask": subtask})

    def sample(
        self,
        observation: Observation,
        noise: Float[Tensor | np.ndarray, "B T A"] | None = None,
        previous: Previous | None = None,
    ) -> Float[Tensor, "B T A"] | Int[Tensor, "B D"]:
        """Normalized actions, float32, or of π0-FAST tokens, int32, which takes no noise.

        A sampler with `rtc` goes on from a `previous` chunk. An observation in NumPy is fastest. A new shape of it
        compiles once.
        """
        actions = self._run("sample", observation, noise, None, previous)
        return actions.clone()  # the next CUDA graph run writes to its memory

    def sample_with_subtask(
        self,
        observation: Observation,
        noise: Float[Tensor | np.ndarray, "B T A"],
        subtask: Int[Tensor | np.ndarray, "B D"] | None = None,
        previous: Previous | None = None,
    ) -> tuple[Int[Tensor, "B D"], Float[Tensor, "B T A"]]:
        """Write a subtask, unless it is given, and sample actions that attend to it; returns its tokens and them.

        Raises ValueError for a sampler without `subtasks`.
        """
        if not self.subtasks:
            raise ValueError("this sampler was made without subtasks; make it with subtasks=True")
        return self._run("sample_with_subtask", observation.prompt_only(), noise, subtask, previous)

    @torch.no_grad()
    def stages(
        self, observation: Observation, noise: Float[Tensor | np.ndarray, "B T A"] | None = None
    ) -> dict[str, Callable[[], Any]]:
        """The stages of `sample` before Euler steps or tokens: calls that compute all up to the end of each."""
        inputs = self.inputs(compact(observation, self.config, self.text_buckets), noise)
        stages: dict[str, Callable[..., Any]] = {"vision": self._fused.embed_prefix, "prefix": self._fused.read_prefix}
        return {name: partial(self._compiled(stage, self.mode), inputs) for name, stage in stages.items()}

    @torch.no_grad()
    def _run(self, program: str, observation: Observation, *arrays: Any) -> Any:
        compacted = compact(observation, self.config, self.text_buckets)
        return self._programs[program](self.inputs(compacted, *arrays))

    def inputs(
        self,
        observation: Observation,
        noise: Float[Tensor | np.ndarray, "B T A"] | None = None,
        subtask: Int[Tensor | np.ndarray, "B D"] | None = None,
        previous: Previous | None = None,
    ) -> Inputs:
        """What the programs take: lists of the cameras that are there, so that their names make no other program.

        Raises ValueError for a previous chunk where the sampler was made without `rtc`.
        """
        if self.rtc is None and previous is not None:
            raise ValueError("this sampler was made without rtc, and takes no previous chunk")
        if self.rtc is not None and noise is not None and previous is None:
            previous = Previous.none(*np.shape(noise))

        def move(x: Any) -> Tensor:  # in order, since other strides would be another program
            return torch.as_tensor(x).to(self.device, copy=True, memory_format=torch.contiguous_format)

        inputs = {
            "state": observation.state,
            "prompt": observation.tokenized_prompt,
            "prompt_mask": observation.tokenized_prompt_mask,
            "noise": noise,
            "subtask": subtask,
        }
        previous = None if previous is None else Previous(*map(move, previous))
        return ({} if previous is None else {"previous": previous}) | {
            "images": [move(x) for x in observation.images.values()],
            "image_masks": [move(x) for x in observation.image_masks.values()],
            **{name: move(value) for name, value in inputs.items() if value is not None},
        }


class FusedModel(nn.Module):
    """The stages of sampling over `weights` of `lay_out`; `attend` is their attention."""

    def __init__(self, weights: Weights, config: ModelConfig, attend: Attend, rtc: RTC | None = None):
        super().__init__()
        self.weights, self.config, self.attend, self.rtc = weights, config, attend, rtc
        self.in_place = rtc is None or rtc.method != "guided"  # a gradient needs the cache as it was
        num_steps = len(weights["steps"]["bias"][0]) if "steps" in weights else 1
        times = numerics.euler_times(num_steps)
        scales = (rtc or RTC()).scales(times)
        self.schedule = list(zip(times.tolist(), scales.tolist(), strict=True))  # numbers, which torch.compile can read

    def sample_actions(self, inputs: Inputs) -> Float[Tensor, "B T A"]:
        """Normalized actions; see `FlowModel.sample_actions`, to which it is numerically equivalent."""
        cache, _, seen = self.read_prefix(inputs, room=self.suffix_length(inputs) * self.in_place)
        return self.integrate(inputs, cache, seen)

    def sample_with_subtask(
        self, inputs: Inputs, *, steps: int, eos_token: int
    ) -> tuple[Int[Tensor, "B D"], Float[Tensor, "B T A"]]:
        """The subtask and the actions after it; see `Pi05.sample_with_subtask`."""
        subtask, suffix = inputs.get("subtask"), self.suffix_length(inputs) * self.in_place
        if subtask is None:
            cache, logits, seen = self.read_prefix(inputs, room=steps + suffix)
            places = F.pad(seen, (0, steps + suffix))
            options: dict[str, Any] = {"read_last": True, "eos_token": eos_token}
            subtask = decode(logits, cache, places, seen.shape[1], steps, self.read_token, **options)
            seen = torch.cat([seen, written(subtask, eos_token)], dim=1)
        else:
            cache, _, seen = self.read_prefix(inputs, room=suffix, eos_token=eos_token)
        return subtask, self.integrate(inputs, cache, seen)

    def sample_tokens(self, inputs: Inputs, *, steps: int, eos_token: int) -> Int[Tensor, "B D"]:
        """Action tokens, greedily; see `Pi0Fast.sample_tokens`."""
        cache, logits, seen = self.read_prefix(inputs, room=steps)
        options: dict[str, Any] = {"skipped": self.config.format.skipped_positions, "eos_token": eos_token}
        return decode(logits, cache, F.pad(seen, (0, steps)), seen.shape[1], steps, self.read_token, **options)

    def suffix_length(self, inputs: Inputs) -> int:
        """Tokens of the suffix."""
        return self.config.family.state_tokens + inputs["noise"].shape[1]

    def read_prefix(
        self, inputs: Inputs, room: int = 0, eos_token: int = numerics.EOS_TOKEN
    ) -> tuple[Cache, Any, Bool[Tensor, "B S"]]:
        """The cache of the prefix and a given subtask, with `room`; logits [B, V] of what follows; and valid tokens."""
        prefix, valid = self.embed_prefix(inputs)
        mask, subtask = valid[:, None], inputs.get("subtask")
        if subtask is not None:
            groups = F.pad(torch.full_like(subtask, masks.SUBTASK), (prefix.shape[1], 0))
            prefix = torch.cat([prefix, self.embed_text(subtask)], dim=1)
            valid = torch.cat([valid, written(subtask, eos_token)], dim=1)
            mask = masks.attention_mask(groups, valid)
        elif self.attend is flash_attention:
            prefix, valid = pad_left(prefix, valid)
            mask = valid[:, None]
        return *self.fill_cache(prefix, mask, valid, room), valid

    def integrate(self, inputs: Inputs, cache: Cache, seen: Bool[Tensor, "B S"]) -> Float[Tensor, "B T A"]:
        """Euler steps from the noise, attending to those places before the suffix that are `seen`."""
        dtype, suffix = self.config.runtime.dtype, self.suffix_length(inputs)
        x_t = cast(inputs["noise"], "action_projections", dtype)
        blocks = torch.tensor([1] * self.config.family.state_tokens + [2] * x_t.shape[1], device=x_t.device)
        valid = torch.cat([seen, seen.new_ones((x_t.shape[0], suffix))], dim=1)
        mask = masks.block_mask(F.pad(blocks, (seen.shape[1], 0)), valid, suffix)
        positions = seen.sum(dim=1, keepdim=True) + torch.arange(suffix, device=x_t.device)
        rope, bias = rotation(positions, self.config.paligemma.head_dim, dtype), mask_bias(mask, self.config)
        state = linear(inputs["state"], *self.weights["state"])[:, None] if "state" in self.weights else None
        previous = inputs.get("previous")
        given = given_actions(self.rtc, previous)

        def step(i: int, x_t: Tensor, time: float, scale: float) -> Tensor:
            def velocity(x_t: Tensor) -> Tensor:
                return self.denoise(cache, state, x_t, rope, bias, step=i, given=given)

            v = guided_velocity(velocity, x_t, time, scale, self.rtc, previous)
            return clamp(x_t + float(np.float32(-1 / len(self.schedule))) * v, given, previous)

        x_t = clamp(x_t, given, previous)
        for i, (time, scale) in enumerate(self.schedule):
            section(f"step {i + 1}")
            x_t = record("actions", step(i, x_t, time, scale))
        return x_t

    def embed_text(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T W"]:
        """Text embeddings × sqrt(W)."""
        dtype = getattr(torch, self.config.runtime.dtype)
        text = rows(self.weights["embedding"][0], tokens).to(dtype)
        return text * float(torch.tensor(self.config.paligemma.width**0.5, dtype=dtype))

    def embed_prefix(self, inputs: Inputs) -> tuple[Float[Tensor, "B S W"], Bool[Tensor, "B S"]]:
        """Tokens of the cameras that are there, then of the prompt; and which of them are valid."""
        text = self.embed_text(inputs["prompt"])
        if not inputs["images"]:
            return text, inputs["prompt_mask"]
        tokens = self.embed_images(torch.stack([pixels(x, self.config.runtime.dtype) for x in inputs["images"]], dim=1))
        image_masks = torch.stack(inputs["image_masks"], dim=1).repeat_interleave(self.config.image_tokens, dim=1)
        return torch.cat([tokens, text], dim=1), torch.cat([image_masks, inputs["prompt_mask"]], dim=1)

    def embed_images(self, images: Float[Tensor, "B C height width 3"]) -> Float[Tensor, "B S W"]:
        """All cameras in one pass of the vision tower."""
        vision, weights, (batch, cameras) = self.config.vision, self.weights["vision"], images.shape[:2]
        patch, heads = vision.patch_size, vision.num_heads
        rows, columns = (size // patch for size in self.config.image_resolution)
        x = images.reshape(batch * cameras, rows, patch, columns, patch, 3).transpose(2, 3)
        kernel, position = weights["patches"]
        x = linear(x.reshape(batch * cameras, rows * columns, -1), kernel) + position
        x = x.to(getattr(torch, self.config.runtime.dtype))
        for w in weights["layers"]:
            dtype, x = x.dtype, cast(x, "residual", dtype_name(x))
            qkv = linear(layer_norm(x, *w["attention_norm"]), *w["qkv"])
            q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + linear(self.attend(q, k, v, None).transpose(1, 2).reshape(x.shape), *w["out"])
            x = x + linear(gelu(linear(layer_norm(x, *w["mlp_norm"]), *w["up"])), *w["down"])
            x = record("vision layer", x.to(dtype))
        x = linear(layer_norm(x, *weights["final_norm"]), *weights["head"])
        return record("image tokens", x.reshape(batch, cameras * rows * columns, -1))

    def fill_cache(
        self,
        x: Float[Tensor, "B S W"],
        mask: Bool[Tensor, "B S S"] | Bool[Tensor, "B 1 S"],
        valid: Bool[Tensor, "B S"],
        room: int,
    ) -> tuple[Cache, Any]:
        """Keys and values of the prefix, with `room` after them; and the logits [B, V] of what follows, if any."""
        gemma, cache = self.config.paligemma, []
        positions = valid.cumsum(dim=1) - 1
        rope, bias = rotation(positions, gemma.head_dim, dtype_name(x)), mask_bias(mask, self.config)
        x = record("prefix tokens", x)
        for w, attention_norm, mlp_norm in self.prefix_layers():
            q, k, v = self.project(rms_norm(x, attention_norm), w, gemma, rope)
            k, v = record("prefix keys", k), record("prefix values", v)
            cache.append((F.pad(k, (0, 0, 0, room)), F.pad(v, (0, 0, 0, room))))
            if "out" in w:
                x = finish_layer(x, self.attend(q, k, v, bias), w, gemma, attention_norm, mlp_norm)
                x = record("prefix layer", x)
        if "out" not in w:
            return cache, None
        last = (valid.cumsum(dim=1) - 1).masked_fill(~valid, -1).argmax(dim=1)
        return cache, self.read_logits(x[torch.arange(x.shape[0], device=x.device), last][:, None])

    def read_token(
        self,
        token: Int[Tensor, "B 1"],
        position: Int[Tensor, "B 1"],
        seen: Bool[Tensor, "B P"],
        slot: Int[Tensor, " 1"],
        cache: Cache,
    ) -> Float[Tensor, "B V"]:
        """The logits of the next token; in the cache, this one takes its place."""
        # flash takes padding at the left alone
        attend = sdpa_attention if self.attend is flash_attention else self.attend
        x, gemma = self.embed_text(token), self.config.paligemma
        rope, bias = rotation(position, gemma.head_dim, dtype_name(x)), mask_bias(seen[:, None], self.config)
        for (w, attention_norm, mlp_norm), (k, v) in zip(self.prefix_layers(), cache, strict=True):
            q, *new = self.project(rms_norm(x, attention_norm), w, gemma, rope)
            for kept, fresh in zip((k, v), new, strict=True):
                kept.index_copy_(2, slot, fresh)
            x = finish_layer(x, attend(q, k, v, bias), w, gemma, attention_norm, mlp_norm)
        return self.read_logits(x)

    def prefix_layers(self) -> list[tuple[Weights, Modulation, Modulation]]:
        """The language model's layers: projections and norms."""
        norms = self.weights["prefix_norms"]
        each = ([at(norm, 0) for norm in norms[name]] for name in ("attention_norms", "mlp_norms"))
        return list(zip(self.weights["prefix"], *each, strict=True))

    def read_logits(self, x: Float[Tensor, "B 1 W"]) -> Float[Tensor, "B V"]:
        """The vocabulary's logits, float32, multiplied in the wider dtype of the two."""
        out = rms_norm(x, at(self.weights["prefix_norms"]["final_norm"], 0))
        (output,) = self.weights["embedding" if self.config.tied_output else "output"]
        return at_least_float32(wider_linear(out, output))[:, 0]

    def denoise(
        self,
        cache: Cache,
        state: Float[Tensor, "B 1 W"] | None,
        x_t: Float[Tensor, "B T A"],
        rope: Rotation,
        bias: Float[Tensor, "B 1 R S+T"],
        step: int,
        given: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T A"]:
        """The velocity at `x_t` in Euler step `step`. The suffix takes its place in the cache, if `in_place`.

        Actions `given` as they are have the weights of t = 0.
        """
        gemma, weights = self.config.action_expert, self.weights
        assert gemma is not None

        def now(name: str, layer: int | None = None) -> Modulation:
            """The constants of this step, those of t = 0 for actions that are given."""

            def of(steps: str, step: int) -> Modulation:
                constants = weights[steps][name]
                return at(constants if layer is None else constants[layer], step)

            if given is None or name not in weights["given"]:
                return of("steps", step)
            pairs = zip(of("given", 0), of("steps", step), strict=True)
            return tuple(torch.where(given[..., None], clean, noisy) for clean, noisy in pairs)

        action_in, (shift,) = weights["action_in"][0], now("bias")
        x = linear(x_t, action_in, shift) if given is None else linear(x_t, action_in) + shift
        if state is not None:
            x = torch.cat([state, linear(F.silu(x), *weights["action_mix"])], dim=1)
        x = cast(x, "action_residual", self.config.runtime.dtype)
        for i, (w, (k, v)) in enumerate(zip(weights["suffix"], cache, strict=True)):
            attention_norm, mlp_norm = now("attention_norms", i), now("mlp_norms", i)
            q, *new = self.project(rms_norm(x, attention_norm), w, gemma, rope)
            if self.in_place:
                for kept, fresh in zip((k, v), new, strict=True):
                    kept[:, :, -x.shape[1] :] = fresh
            else:
                k, v = (torch.cat([kept, fresh], dim=2) for kept, fresh in zip((k, v), new, strict=True))
            x = finish_layer(x, self.attend(q, k, v, bias), w, gemma, attention_norm, mlp_norm)
            x = record("suffix layer", x)
        return linear(rms_norm(x, now("final_norm"))[:, -x_t.shape[1] :], *weights["action_out"])

    def project(
        self, x: Float[Tensor, "B T W"], w: Weights, gemma: GemmaConfig, rope: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, K, R, H] and keys [B, K, T, H], and values [B, K, T, H]."""
        groups, heads = gemma.num_kv_heads, linear(x, *w["qkv"]).unflatten(-1, (-1, gemma.head_dim))
        rounding = numerics.rounding(self.config.family.query_rounding, dtype_name(heads))
        rotated = apply_rope(heads[:, :, :-groups], rope, rounding)
        q = rotated[:, :, :-groups].unflatten(2, (groups, -1)).transpose(1, 2)
        k, v = rotated[:, :, -groups:].to(heads.dtype).transpose(1, 2), heads[:, :, -groups:].transpose(1, 2)
        return q.flatten(2, 3), k, v


def mask_bias(mask: Bool[Tensor, "B T S"], config: ModelConfig) -> Float[Tensor, "B 1 R S"]:
    """What is added to logits: 0, or so much below 0 that it leaves nothing of a logit. One row serves all queries."""
    bias = torch.where(mask, 0.0, numerics.MASKED_LOGIT).to(getattr(torch, config.runtime.dtype))
    groups = config.paligemma.num_heads // config.paligemma.num_kv_heads if bias.shape[1] > 1 else 1
    return bias[:, torch.arange(bias.shape[1] * groups, device=bias.device) // groups][:, None]
