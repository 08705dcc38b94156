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

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pi0 import numerics
from pi0.config import GemmaConfig, ModelConfig
from pi0.observation import Observation
from pi0.policy.buckets import TEXT_BUCKETS, compact, placeholder, text_lengths
from pi0_torch.attention import Attend, attention_backend, flash_attention
from pi0_torch.loading import to_device
from pi0_torch.models.gemma import (
    AdaptiveRMSNorm,
    Expert,
    RMSNorm,
    Rotation,
    apply_rope,
    gated_residual,
    normalize,
    rotation,
)
from pi0_torch.models.layers import LayerNorm, Linear, cast, dtype_name, gelu
from pi0_torch.models.pi0 import Pi0, embed_time, suffix_blocks
from pi0_torch.models.pi0_fast import Pi0Fast
from pi0_torch.models.siglip import SigLIP
from pi0_torch.models.vision_language import ReadToken, VisionLanguageModel, attention_mask, pixels

Weights = Any  # nested nn.ModuleDict and nn.ModuleList of nn.ParameterList, in which `torch.compile` sees constants
Modulation = tuple[Tensor, ...]  # of a norm: 1 + scale; of an adaptive norm shift and gate too
Cache = list[tuple[Float[Tensor, "B K S+T H"], Float[Tensor, "B K S+T H"]]]  # one entry per layer


class Sampler:
    """`model.sample_actions`, compiled, for `num_steps` (default: the config's) Euler steps.

    Prompts are cut to one of `text_buckets`. `attention` is one of `ATTENTION`. `compile` makes one graph of each shape
    of input (default: on a GPU), in `mode` of `torch.compile` (default on a GPU: "reduce-overhead", CUDA graphs);
    without it, every operation runs by itself, which a debugger can follow. With `warm_up`, graphs for one robot with
    all cameras and any prompt are made now. The model is not needed afterwards. Raises ValueError for a model with
    LoRA, which is to be merged first, and for an attention that is unknown or not to be had here: "flash" needs the
    package flash-attn, a GPU and bfloat16, "flex" a GPU to be compiled.
    """

    def __init__(
        self,
        model: Pi0,
        *,
        num_steps: int | None = None,
        text_buckets: Sequence[int] = TEXT_BUCKETS,
        attention: str = "sdpa",
        compile: bool | None = None,
        mode: str | None = None,
        warm_up: bool = True,
    ):
        self.config, self.text_buckets = check_plain(model), text_buckets
        self.num_steps = model.config.runtime.num_steps if num_steps is None else num_steps
        self.device = model.paligemma.embedding.device
        attend = attention_backend(attention, self.config, self.device)
        with torch.no_grad():
            self.weights = as_module(lay_out(model, self.num_steps))
        cuda = self.device.type == "cuda"
        self.compile = cuda if compile is None else compile
        if self.compile and attention == "flex" and not cuda:
            raise ValueError("attention 'flex': PyTorch cannot compile it on a CPU; use sdpa, or compile=False")
        self.mode = "reduce-overhead" if mode is None and cuda else mode
        self._program = lambda inputs: sample(self.weights, self.config, attend, inputs)
        if self.compile:
            torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)  # shapes; else 8
            self._program = torch.compile(self._program, fullgraph=True, dynamic=False, mode=self.mode)
        if warm_up:
            self.warm_up()

    def warm_up(self, batches: Sequence[int] = (1,), cameras: Sequence[int] | None = None) -> None:
        """Make the programs for these batch sizes and numbers of cameras (default: all of the model's), any prompt."""
        for batch in batches:
            for count in [len(self.config.image_keys)] if cameras is None else cameras:
                for length in text_lengths(self.config, self.text_buckets):
                    noise = np.zeros((batch, self.config.action_horizon, self.config.action_dim), np.float32)
                    for _ in range(3 if self.compile else 1):  # CUDA graphs are recorded in the second call
                        self._run(placeholder(self.config, batch, count, length), noise)

    def sample(self, observation: Observation, noise: Float[Tensor | np.ndarray, "B T A"]) -> Float[Tensor, "B T A"]:
        """The actions, float32. An observation in NumPy is fastest. A new shape of it compiles once."""
        return self._run(compact(observation, self.config, self.text_buckets), noise)

    @torch.no_grad()
    def _run(self, observation: Observation, noise: Float[Tensor | np.ndarray, "B T A"]) -> Float[Tensor, "B T A"]:
        inputs = self.inputs(observation, noise)
        return self._program(inputs).clone()  # out of the memory that the next CUDA graph run writes to

    def inputs(self, observation: Observation, noise: Float[Tensor | np.ndarray, "B T A"]) -> dict[str, Any]:
        """What the programs take: lists of the cameras that are there, so that their names make no other program."""

        def move(x: Any) -> Tensor:  # in order, since other strides would be another program
            return torch.as_tensor(x).to(self.device, copy=True, memory_format=torch.contiguous_format)

        return {
            "images": [move(x) for x in observation.images.values()],
            "image_masks": [move(x) for x in observation.image_masks.values()],
            "state": move(observation.state),
            "prompt": move(observation.tokenized_prompt),
            "prompt_mask": move(observation.tokenized_prompt_mask),
            "noise": move(noise),
        }


class TokenSampler:
    """`model.sample_tokens` of π0-FAST after prompts that are cut to one of `text_buckets`.

    Writes at most `max_decoding_steps` tokens (default: as many as the config says). With `compile` (default: on a GPU)
    what each token takes is one graph; a new batch size or bucket makes another. Raises ValueError for a model with
    LoRA, which is to be merged first.
    """

    def __init__(
        self,
        model: Pi0Fast,
        *,
        max_decoding_steps: int | None = None,
        text_buckets: Sequence[int] = TEXT_BUCKETS,
        eos_token: int = numerics.EOS_TOKEN,
        compile: bool | None = None,
    ):
        self.model, self.config, self.text_buckets = model, check_plain(model), text_buckets
        self.max_decoding_steps, self.eos_token = max_decoding_steps, eos_token
        self.device = model.paligemma.embedding.device
        self.compile = self.device.type == "cuda" if compile is None else compile
        self._read_token: ReadToken = model.read_token
        if self.compile:
            self._read_token = torch.compile(model.read_token, fullgraph=True, dynamic=False)

    def sample(self, observation: Observation) -> Int[Tensor, "B D"]:
        """The tokens, int32. An observation in NumPy is fastest."""
        inputs = to_device(compact(observation, self.config, self.text_buckets), self.device)
        return self.model.sample_tokens(
            inputs, self.max_decoding_steps, eos_token=self.eos_token, read_token=self._read_token
        )


def check_plain(model: VisionLanguageModel) -> ModelConfig:
    """The config of a model that can be laid out. Raises ValueError for LoRA."""
    config = model.config
    if any(gemma is not None and gemma.lora_rank is not None for gemma in (config.paligemma, config.action_expert)):
        raise ValueError("the model has LoRA, which costs time in every call; merge it: pi0-convert ... --lora merge")
    return config


def lay_out(model: Pi0, num_steps: int) -> dict[str, Any]:
    """All parameters in the layout and the dtypes that `sample` reads."""
    pi0, paligemma = model.config.kind == "pi0", model.paligemma
    prefix = expert_weights(paligemma)
    queries = model.config.paligemma.num_heads * model.config.paligemma.head_dim
    prefix[-1] = {"qkv": (prefix[-1]["qkv"][0][queries:],)}  # nobody reads what the last layer's queries give
    return {
        "embedding": (paligemma.embedding,),
        "vision": vision_weights(model.vision),
        "prefix": prefix,
        "prefix_norms": norm_weights(paligemma, None, 1),
        "suffix": expert_weights(model.action_expert),
        "steps": step_weights(model, num_steps),
        "action_in": (action_in_weights(model),),
        "action_out": projection(model.action_out_proj),
        **({"state": projection(model.state_proj), "action_mix": projection(model.action_time_mlp_out)} if pi0 else {}),
    }


def vision_weights(vision: SigLIP) -> dict[str, Any]:
    """The vision tower: patches as a matrix product, its bias within the position embedding; fused projections."""
    layers: Any = vision.layers  # which mypy takes for tensors
    patches = vision.patch_embedding
    kernel, bias, position = (
        cast(p, "patches", vision.dtype) for p in (patches.weight, patches.bias, vision.position_embedding)
    )
    return {
        "patches": (kernel.permute(0, 2, 3, 1).flatten(1), position + bias),
        "layers": [
            {
                "attention_norm": layer_norm_weights(block.attention_norm),
                "qkv": projection(block.attention.query, block.attention.key, block.attention.value),
                "out": projection(block.attention.out),
                "mlp_norm": layer_norm_weights(block.mlp_norm),
                "up": projection(block.mlp.up),
                "down": projection(block.mlp.down),
            }
            for block in layers
        ],
        "final_norm": layer_norm_weights(vision.final_norm),
        "head": projection(vision.head),
    }


def expert_weights(expert: Expert) -> list[dict[str, Any]]:
    """The projections of each layer: query, key and value in one, and gate and up."""
    layers: Any = expert.layers
    return [
        {
            "qkv": projection(block.attention.query, block.attention.key, block.attention.value),
            "out": projection(block.attention.out),
            "gate_up": projection(block.mlp.gate, block.mlp.up),
            "down": projection(block.mlp.down),
        }
        for block in layers
    ]


def step_weights(model: Pi0, num_steps: int) -> dict[str, Any]:
    """What each Euler step adds that no observation changes: leaves [E, ...]."""
    assert model.config.action_expert is not None
    times = torch.from_numpy(numerics.euler_times(num_steps)).to(model.action_in_proj.weight.device)
    embedded = embed_time(times, model.config.action_expert.width)
    condition, bias = None, projection(model.action_in_proj)[1].expand_as(embedded)
    if model.config.kind == "pi05":
        condition = F.silu(model.time_mlp_out(F.silu(model.time_mlp_in(embedded))))
    else:  # the time half of action_time_mlp_in
        bias = linear(torch.cat([bias, embedded], dim=-1), *projection(model.action_time_mlp_in))
    return {"bias": (bias,), **norm_weights(model.action_expert, condition, num_steps)}


def norm_weights(expert: Expert, condition: Float[Tensor, "E W"] | None, num_steps: int) -> dict[str, Any]:
    """An expert's norms in each step."""
    layers: Any = expert.layers
    return {
        "attention_norms": [modulation(block.attention_norm, condition, num_steps) for block in layers],
        "mlp_norms": [modulation(block.mlp_norm, condition, num_steps) for block in layers],
        "final_norm": modulation(expert.final_norm, condition, num_steps),
    }


def action_in_weights(model: Pi0) -> Float[Tensor, "W A"]:
    """What actions are multiplied with: action_in_proj, with π0 together with the action half of action_time_mlp_in."""
    kernel = projection(model.action_in_proj)[0]
    if model.config.kind == "pi05":
        return kernel
    return projection(model.action_time_mlp_in)[0][:, : len(kernel)] @ kernel


def modulation(norm: RMSNorm | AdaptiveRMSNorm, condition: Float[Tensor, "E W"] | None, num_steps: int) -> Modulation:
    """1 + scale and, of an adaptive norm, shift and gate of each step: [E, W]."""
    if isinstance(norm, RMSNorm):
        scale = 1 + cast(norm.scale, "norm", norm.dtype)
        return (scale.expand(num_steps, -1),)
    scale, shift, gate = norm.modulation(condition).chunk(3, dim=-1)
    return 1 + cast(scale, "norm", norm.dtype), cast(shift, "norm", norm.dtype), gate


def projection(*linears: Linear) -> tuple[Tensor, ...]:
    """Weight [out, in] and bias [out], if any, of projections side by side, in their compute dtype."""
    weight = torch.cat([one.weight.to(one.dtype) for one in linears])
    if linears[0].bias is None:
        return (weight,)
    return weight, torch.cat([one.bias.to(one.dtype) for one in linears if one.bias is not None])


def layer_norm_weights(norm: LayerNorm) -> tuple[Tensor, Tensor]:
    """Scale and bias."""
    return cast(norm.scale, "norm", norm.dtype), cast(norm.bias, "norm", norm.dtype)


def as_module(tree: Any) -> Any:
    """Nested dicts, lists and tuples of tensors as a module: what CUDA graphs need not copy."""
    if isinstance(tree, dict):
        return nn.ModuleDict({name: as_module(value) for name, value in tree.items()})
    if isinstance(tree, list):
        return nn.ModuleList(as_module(value) for value in tree)
    return nn.ParameterList(nn.Parameter(x.detach().contiguous(), requires_grad=False) for x in tree)


def sample(weights: Weights, config: ModelConfig, attend: Attend, inputs: dict[str, Any]) -> Float[Tensor, "B T A"]:
    """Euler steps from `inputs["noise"]`; see `models.pi0.Pi0.sample_actions`, whose numbers these are."""
    x_t = inputs["noise"].float()
    prefix, valid = embed_prefix(weights, config, attend, inputs)
    if attend is flash_attention:
        prefix, valid = pad_left(prefix, valid)
    blocks = suffix_blocks(config.kind, x_t.shape[1])
    cache = fill_cache(weights, config, attend, prefix, valid, room=len(blocks))
    positions = valid.sum(dim=1, keepdim=True) + torch.arange(len(blocks), device=x_t.device)
    suffix_valid = valid.new_ones((len(x_t), len(blocks)))
    key_blocks = np.concatenate([np.zeros(prefix.shape[1], int), blocks])
    mask = attention_mask(blocks, key_blocks, suffix_valid, torch.cat([valid, suffix_valid], dim=1))
    state = linear(inputs["state"], *weights["state"])[:, None] if config.kind == "pi0" else None
    turn, bias = rotation(positions, config.paligemma.head_dim), mask_bias(mask, config)
    num_steps = len(weights["steps"]["bias"][0])
    for i in range(num_steps):
        x_t = x_t + float(np.float32(-1 / num_steps)) * denoise(
            weights, config, attend, cache, state, x_t, turn, bias, step=i
        )
    return x_t


def embed_prefix(
    weights: Weights, config: ModelConfig, attend: Attend, inputs: dict[str, Any]
) -> tuple[Float[Tensor, "B S W"], Bool[Tensor, "B S"]]:
    """Tokens of the cameras that are there, then of the prompt; and which of them are valid."""
    dtype = getattr(torch, config.runtime.dtype)
    text = F.embedding(inputs["prompt"], weights["embedding"][0]).to(dtype)
    text = text * float(torch.tensor(config.paligemma.width**0.5, dtype=dtype))
    if not inputs["images"]:
        return text, inputs["prompt_mask"]
    images = torch.stack([pixels(x) for x in inputs["images"]], dim=1)
    tokens = embed_images(weights["vision"], config, attend, images)
    masks = torch.stack(inputs["image_masks"], dim=1).repeat_interleave(config.image_tokens, dim=1)
    return torch.cat([tokens, text], dim=1), torch.cat([masks, inputs["prompt_mask"]], dim=1)


def embed_images(
    weights: Weights, config: ModelConfig, attend: Attend, images: Float[Tensor, "B C height width 3"]
) -> Float[Tensor, "B S W"]:
    """All cameras in one pass of the vision tower."""
    patch, heads, (batch, cameras) = config.vision.patch_size, config.vision.num_heads, images.shape[:2]
    rows, columns = (size // patch for size in config.image_resolution)
    x = images.reshape(batch * cameras, rows, patch, columns, patch, 3).transpose(2, 3)
    kernel, position = weights["patches"]
    x = linear(x.reshape(batch * cameras, rows * columns, -1), kernel) + position
    x = x.to(getattr(torch, config.runtime.dtype))
    for w in weights["layers"]:
        qkv = linear(layer_norm(x, *w["attention_norm"]), *w["qkv"])
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + linear(attend(q, k, v, None).transpose(1, 2).reshape(x.shape), *w["out"])
        x = x + linear(gelu(linear(layer_norm(x, *w["mlp_norm"]), *w["up"])), *w["down"])
    x = linear(layer_norm(x, *weights["final_norm"]), *weights["head"])
    return x.reshape(batch, cameras * rows * columns, -1)


def fill_cache(
    weights: Weights,
    config: ModelConfig,
    attend: Attend,
    x: Float[Tensor, "B S W"],
    valid: Bool[Tensor, "B S"],
    room: int,
) -> Cache:
    """Keys and values of the prefix, with `room` for those of the suffix after them."""
    gemma, norms, cache = config.paligemma, weights["prefix_norms"], []
    turn, bias = rotation(valid.cumsum(dim=1) - 1, gemma.head_dim), mask_bias(valid[:, None], config)
    for i, w in enumerate(weights["prefix"]):
        attention_norm, mlp_norm = (at(norms[name][i], 0) for name in ("attention_norms", "mlp_norms"))
        q, k, v = project(rms_norm(x, attention_norm), w, gemma, turn)
        cache.append((F.pad(k, (0, 0, 0, room)), F.pad(v, (0, 0, 0, room))))
        if i < gemma.depth - 1:
            x = finish_layer(x, attend(q, k, v, bias), w, gemma, attention_norm, mlp_norm)
    return cache


def denoise(
    weights: Weights,
    config: ModelConfig,
    attend: Attend,
    cache: Cache,
    state: Float[Tensor, "B 1 W"] | None,
    x_t: Float[Tensor, "B T A"],
    turn: Rotation,
    bias: Float[Tensor, "B 1 R S+T"],
    step: int,
) -> Float[Tensor, "B T A"]:
    """The velocity at `x_t` in Euler step `step`. The suffix takes its place in the cache."""
    gemma, now = config.action_expert, weights["steps"]
    assert gemma is not None
    x = linear(x_t, weights["action_in"][0], now["bias"][0][step])
    if state is not None:
        x = torch.cat([state, linear(F.silu(x), *weights["action_mix"])], dim=1)
    x = x.to(getattr(torch, config.runtime.dtype))
    for i, (w, (k, v)) in enumerate(zip(weights["suffix"], cache, strict=True)):
        attention_norm, mlp_norm = (at(now[name][i], step) for name in ("attention_norms", "mlp_norms"))
        q, *new = project(rms_norm(x, attention_norm), w, gemma, turn)
        for kept, fresh in zip((k, v), new, strict=True):
            kept[:, :, -x.shape[1] :] = fresh
        x = finish_layer(x, attend(q, k, v, bias), w, gemma, attention_norm, mlp_norm)
    return linear(rms_norm(x, at(now["final_norm"], step))[:, -x_t.shape[1] :], *weights["action_out"])


def project(x: Float[Tensor, "B T W"], w: Weights, gemma: GemmaConfig, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [B, K, R, H] and keys [B, K, T, H], and values [B, K, T, H]."""
    groups = gemma.num_kv_heads
    heads = linear(x, *w["qkv"]).unflatten(-1, (-1, gemma.head_dim))
    rotated = apply_rope(heads[:, :, :-groups], turn, dtype_name(x))
    q = rotated[:, :, :-groups].unflatten(2, (groups, -1)).transpose(1, 2)
    k, v = rotated[:, :, -groups:].transpose(1, 2), heads[:, :, -groups:].transpose(1, 2)
    return q.flatten(2, 3), k, v


def pad_left(
    prefix: Float[Tensor, "B S W"], valid: Bool[Tensor, "B S"]
) -> tuple[Float[Tensor, "B S W"], Bool[Tensor, "B S"]]:
    """The tokens of each row in their order, those that are not valid before all others."""
    order = valid.to(torch.uint8).argsort(dim=1, stable=True)
    return prefix.take_along_dim(order[..., None], dim=1), valid.take_along_dim(order, dim=1)


def mask_bias(mask: Bool[Tensor, "B T S"], config: ModelConfig) -> Float[Tensor, "B 1 R S"]:
    """What is added to logits: 0, or so much below 0 that it leaves nothing of a logit. One row serves all queries."""
    bias = torch.where(mask, 0.0, numerics.MASKED_LOGIT).to(getattr(torch, config.runtime.dtype))
    groups = config.paligemma.num_heads // config.paligemma.num_kv_heads if bias.shape[1] > 1 else 1
    return bias.repeat_interleave(groups, dim=1)[:, None]


def finish_layer(
    x: Float[Tensor, "B T W"],
    attended: Float[Tensor, "B K R H"],
    w: Weights,
    gemma: GemmaConfig,
    attention_norm: Modulation,
    mlp_norm: Modulation,
) -> Float[Tensor, "B T W"]:
    """A layer from its attention on: output projection and MLP, each with its residual."""
    attended = attended.unflatten(2, (x.shape[1], -1)).transpose(1, 2).flatten(2)
    x = gated_residual(x, linear(attended, *w["out"]), gate_of(attention_norm))
    gate, up = linear(rms_norm(x, mlp_norm), *w["gate_up"]).chunk(2, dim=-1)
    return gated_residual(x, linear(gelu(gate) * up, *w["down"]), gate_of(mlp_norm))


def at(norm: Modulation, step: int) -> Modulation:
    """A norm in one step."""
    return tuple(x[step] for x in norm)


def gate_of(norm: Modulation) -> Tensor | None:
    """The gate of an adaptive norm, None of a plain one."""
    return norm[2] if len(norm) == 3 else None


def rms_norm(x: Float[Tensor, "B T W"], norm: Modulation) -> Float[Tensor, "B T W"]:
    """RMS norm with scale, and shift where there is one, in float32, rounded to the dtype of `x`."""
    y = normalize(x, dtype_name(x)) * norm[0]
    return (y if len(norm) == 1 else y + norm[1]).to(x.dtype)


def layer_norm(x: Float[Tensor, "B S W"], scale: Float[Tensor, " W"], bias: Float[Tensor, " W"]) -> Tensor:
    """Layer norm in float32, rounded to the dtype of `x`."""
    return F.layer_norm(x.to(scale.dtype), scale.shape, scale, bias, numerics.LAYER_NORM_EPS).to(x.dtype)


def linear(
    x: Float[Tensor, "..."], weight: Float[Tensor, "out in"], bias: Tensor | None = None
) -> Float[Tensor, "..."]:
    """x·weightᵀ (+ bias) in the weight's dtype, rounded once at the end."""
    return F.linear(x.to(weight.dtype), weight, bias)
