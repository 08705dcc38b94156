"""The parameters of a model in the layout that `Sampler` reads: fused projections, and constants of each Euler step.

Axes: S prefix tokens, W width, M mlp, L layers, A action dim, E Euler steps.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pi0 import numerics
from pi0.config import GemmaConfig
from pi0_jax.loading import Model
from pi0_jax.models.gemma import AdaptiveRMSNorm, Expert, RMSNorm, gated_residual, normalize
from pi0_jax.models.layers import LayerNorm, Linear, cast, gelu
from pi0_jax.models.siglip import SigLIP

Weights = dict[str, Any]
Modulation = tuple[Array, ...]  # of a norm: 1 + scale; of an adaptive norm shift and gate too


def lay_out(model: Model, num_steps: int, text: bool, given: bool = False) -> Weights:
    """All parameters but those of [vocabulary, width] in the layout and the dtypes that `Sampler` reads, LoRA merged.

    Without `text`, the language model ends with the keys and values of its last layer. With `given`, there are the
    constants of actions that are given as they are, at t = 0.
    """
    gemma, prefix = model.config.paligemma, expert_weights(model.paligemma)
    if not text:
        prefix[-1] = {"qkv": (prefix[-1]["qkv"][0][:, gemma.num_heads * gemma.head_dim :],)}
    return {
        "vision": vision_weights(model.vision),
        "prefix": prefix,
        "prefix_norms": norm_weights(model.paligemma, None, 1),
        **({} if model.config.action_expert is None else suffix_weights(model, num_steps, given)),
    }


def suffix_weights(model: Any, num_steps: int, given: bool = False) -> Weights:
    """The action expert and its projections; what each Euler step adds that no observation changes in `steps`."""
    steps = model.suffix_steps(jnp.asarray(numerics.euler_times(num_steps)))
    extra = {"action_mix": steps.action_mix, "state": steps.state}
    weights: dict[str, Any] = {
        "suffix": expert_weights(model.action_expert),
        "steps": {"bias": (steps.bias,), **norm_weights(model.action_expert, steps.condition, num_steps)},
        "action_in": (steps.action_in,),
        "action_out": projection(model.action_out_proj),
        **{name: projection(linear) for name, linear in extra.items() if linear is not None},
    }
    if given:
        clean = model.suffix_steps(jnp.zeros(1))
        norms = {} if clean.condition is None else norm_weights(model.action_expert, clean.condition, 1)
        weights["given"] = jax.tree.map(lambda x: x[0], {"bias": (clean.bias,), **norms})
    return weights


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


def norm_weights(expert: Expert, condition: Float[Array, "E W"] | None, num_steps: int) -> Weights:
    """An expert's norms in each step."""
    layers = expert.layers
    return {
        "attention_norms": unstack(modulation(layers.attention_norm, condition, num_steps), axis=1),
        "mlp_norms": unstack(modulation(layers.mlp_norm, condition, num_steps), axis=1),
        "final_norm": modulation(expert.final_norm, condition, num_steps),
    }


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
    """Kernels [(L,) in, out] and biases [(L,) out], if any, of projections side by side, LoRA merged."""
    dtype, kernels, biases = linears[0].dtype, [], []
    for one in linears:
        kernel = one.merged_kernel()
        layers, inputs = kernel.shape[:stacked], kernel.shape[stacked : stacked + one.in_ndim]
        kernels.append(kernel.astype(dtype).reshape(*layers, int(np.prod(inputs)), -1))
        if one.bias is not None:
            biases.append(one.bias[...].astype(dtype).reshape(*layers, -1))
    return tuple(jnp.concatenate(parts, axis=-1) for parts in (kernels, biases) if parts)


def layer_norm_weights(norm: LayerNorm) -> tuple[Array, Array]:
    """Scale and bias, each [W]."""
    return cast(norm.scale[...], "norm", norm.dtype), cast(norm.bias[...], "norm", norm.dtype)


def unstack(stacked: Any, axis: int = 0) -> list[Any]:
    """One entry per layer, so that no step of a loop has to copy a layer's weights out of the stack."""
    count = jax.tree.leaves(stacked)[0].shape[axis]
    return [jax.tree.map(lambda x: jnp.take(x, i, axis=axis), stacked) for i in range(count)]  # noqa: B023


def linear(x: Float[Array, "..."], kernel: Float[Array, "..."], bias: Array | None = None) -> Float[Array, "..."]:
    """x·kernel (+ bias [out]) in the kernel's dtype, rounded once at the end."""
    x = x.astype(kernel.dtype)
    if bias is None:
        return jnp.matmul(x, kernel)
    accumulator = numerics.at_least_float32(kernel.dtype.name)
    return (jnp.matmul(x, kernel, preferred_element_type=accumulator) + bias).astype(kernel.dtype)


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
    dtype, x = x.dtype, cast(x, "residual", x.dtype.name)
    x = gated_residual(x, linear(attended, *w["out"]), gate_of(attention_norm))
    gate, up = jnp.split(linear(rms_norm(x, mlp_norm), *w["gate_up"]), 2, axis=-1)
    return gated_residual(x, linear(gelu(gate) * up, *w["down"]), gate_of(mlp_norm)).astype(dtype)


def at(norms: Any, step: int) -> Any:
    """Norms in one step."""
    return jax.tree.map(lambda x: x[step], norms)


def gate_of(norm: Modulation) -> Array | None:
    """The gate [W] of an adaptive norm, None of a plain one."""
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
