"""The parameters of a model in the layout that `Sampler` reads: fused projections, and constants of each Euler step.

Axes: S prefix tokens, W width, M mlp, A action dim, E Euler steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pi0 import numerics
from pi0.config import GemmaConfig
from pi0_torch.loading import Model
from pi0_torch.models.gemma import AdaptiveRMSNorm, Expert, RMSNorm, gated_residual, normalize
from pi0_torch.models.layers import LayerNorm, Linear, cast, dtype_name, gelu
from pi0_torch.models.siglip import SigLIP

Weights = Any  # nested nn.ModuleDict and nn.ModuleList of nn.ParameterList, in which `torch.compile` sees constants
Modulation = tuple[Tensor, ...]  # of a norm: 1 + scale; of an adaptive norm shift and gate too


@torch.no_grad()
def lay_out(model: Model, num_steps: int, text: bool, given: bool = False, kept: torch.dtype | None = None) -> Weights:
    """All parameters in the layout and the dtypes that `Sampler` reads, LoRA merged, in memory of their own.

    Without `text`, the language model ends with the keys and values of its last layer, and the text embedding, the
    largest tensor, is kept in the compute dtype; with it in the parameters' own, in which logits are multiplied. With
    `given`, there are the constants of actions that are given as they are, at t = 0. What `kept`, a narrower dtype,
    holds exactly is stored in it.
    """
    gemma, embedding = model.config.paligemma, model.paligemma.embedding
    shared = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    prefix = expert_weights(model.paligemma)
    if not text:
        prefix[-1] = {"qkv": (prefix[-1]["qkv"][0][gemma.num_heads * gemma.head_dim :],)}
    parts = nn.ModuleDict({"prefix": as_module(prefix, shared, kept)})  # one after the other: they are large
    del prefix
    parts["vision"] = as_module(vision_weights(model.vision), shared, kept)
    tables = {"embedding": (embedding if text or kept is not None else embedding.to(model.paligemma.dtype),)}
    tables |= {} if model.config.tied_output else {"output": (model.paligemma.output,)}
    parts.update(as_module(tables, shared))
    rest = {
        "prefix_norms": norm_weights(model.paligemma, None, 1),
        **({} if model.config.action_expert is None else suffix_weights(model, num_steps, given)),
    }
    parts.update(as_module(rest, shared, kept))
    return parts


def suffix_weights(model: Any, num_steps: int, given: bool = False) -> dict[str, Any]:
    """The action expert and its projections; what each Euler step adds that no observation changes in `steps`."""
    times = torch.from_numpy(numerics.euler_times(num_steps)).to(model.action_in_proj.weight.device)
    steps = model.suffix_steps(times)
    extra = {"action_mix": steps.action_mix, "state": steps.state}
    weights: dict[str, Any] = {
        "suffix": expert_weights(model.action_expert),
        "steps": {"bias": (steps.bias,), **norm_weights(model.action_expert, steps.condition, num_steps)},
        "action_in": (steps.action_in,),
        "action_out": projection(model.action_out_proj),
        **{name: projection(linear) for name, linear in extra.items() if linear is not None},
    }
    if given:
        clean = model.suffix_steps(torch.zeros_like(times[:1]))
        norms = {} if clean.condition is None else norm_weights(model.action_expert, clean.condition, 1)
        weights["given"] = {"bias": (clean.bias,), **norms}
    return weights


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


def norm_weights(expert: Expert, condition: Float[Tensor, "E W"] | None, num_steps: int) -> dict[str, Any]:
    """An expert's norms in each step."""
    layers: Any = expert.layers
    return {
        "attention_norms": [modulation(block.attention_norm, condition, num_steps) for block in layers],
        "mlp_norms": [modulation(block.mlp_norm, condition, num_steps) for block in layers],
        "final_norm": modulation(expert.final_norm, condition, num_steps),
    }


def modulation(norm: RMSNorm | AdaptiveRMSNorm, condition: Float[Tensor, "E W"] | None, num_steps: int) -> Modulation:
    """1 + scale and, of an adaptive norm, shift and gate of each step: [E, W]."""
    if isinstance(norm, RMSNorm):
        scale = 1 + cast(norm.scale, "norm", norm.dtype)
        return (scale.expand(num_steps, -1),)
    scale, shift, gate = norm.modulation(condition).chunk(3, dim=-1)
    return 1 + cast(scale, "norm", norm.dtype), cast(shift, "norm", norm.dtype), gate


def projection(*linears: Linear) -> tuple[Tensor, ...]:
    """Weights [out, in] and biases [out], if any, of projections side by side, LoRA merged."""
    weight = torch.cat([one.merged_weight().to(one.dtype) for one in linears])
    if linears[0].bias is None:
        return (weight,)
    return weight, torch.cat([one.bias.to(one.dtype) for one in linears if one.bias is not None])


def layer_norm_weights(norm: LayerNorm) -> tuple[Tensor, Tensor]:
    """Scale and bias, each [W]."""
    return cast(norm.scale, "norm", norm.dtype), cast(norm.bias, "norm", norm.dtype)


def as_module(tree: Any, shared: set[int], kept: torch.dtype | None = None) -> Any:
    """Nested dicts, lists and tuples of tensors as a module: what CUDA graphs need not copy.

    Tensors in storages at the addresses `shared`, and those that are a part of their storage, are copied. `kept` is
    that of `lay_out`.
    """
    if isinstance(tree, dict):
        return nn.ModuleDict({name: as_module(value, shared, kept) for name, value in tree.items()})
    if isinstance(tree, list):
        return nn.ModuleList(as_module(value, shared, kept) for value in tree)
    tensors = [x.detach().contiguous() for x in tree]
    narrow = [kept is not None and torch.equal(x.to(kept).to(x.dtype), x) for x in tensors]
    stored = [x.to(kept) if small else x for x, small in zip(tensors, narrow, strict=True)]
    parameters = [nn.Parameter(own(x, shared), requires_grad=False) for x in stored]
    return Widened(parameters, [x.dtype for x in tensors]) if any(narrow) else nn.ParameterList(parameters)


def own(x: Tensor, shared: set[int]) -> Tensor:
    """A tensor of any shape that has a storage for itself, none at the addresses `shared`."""
    storage = x.untyped_storage()
    return x.clone() if storage.data_ptr() in shared or storage.nbytes() > x.nbytes else x


class Widened(nn.ParameterList):
    """Tensors that are stored in a narrower dtype than that in which they are computed with."""

    def __init__(self, parameters: list[nn.Parameter], dtypes: list[torch.dtype]):
        super().__init__(parameters)
        self.dtypes = dtypes

    def __getitem__(self, i: Any) -> Any:
        return super().__getitem__(i).to(self.dtypes[i])


def linear(
    x: Float[Tensor, "..."], weight: Float[Tensor, "out in"] | nn.Module, bias: Tensor | None = None
) -> Float[Tensor, "..."]:
    """x·weightᵀ (+ bias [out]) in the weight's dtype, rounded once at the end; or as a quantized weight does it."""
    return F.linear(x.to(weight.dtype), weight, bias) if isinstance(weight, Tensor) else weight(x, bias)


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
    dtype, x = x.dtype, cast(x, "residual", dtype_name(x))
    x = gated_residual(x, linear(attended, *w["out"]), gate_of(attention_norm))
    gate, up = linear(rms_norm(x, mlp_norm), *w["gate_up"]).chunk(2, dim=-1)
    return gated_residual(x, linear(gelu(gate) * up, *w["down"]), gate_of(mlp_norm)).to(dtype)


def at(norm: Modulation, step: int) -> Modulation:
    """A norm in one step."""
    return tuple(x[step] for x in norm)


def gate_of(norm: Modulation) -> Tensor | None:
    """The gate [W] of an adaptive norm, None of a plain one."""
    return norm[2] if len(norm) == 3 else None


def rms_norm(x: Float[Tensor, "B T W"], norm: Modulation) -> Float[Tensor, "B T W"]:
    """RMS norm with scale, and shift where there is one, in float32, rounded to the dtype of `x`."""
    y = normalize(x, dtype_name(x)) * norm[0]
    return (y if len(norm) == 1 else y + norm[1]).to(x.dtype)


def layer_norm(x: Float[Tensor, "B S W"], scale: Float[Tensor, " W"], bias: Float[Tensor, " W"]) -> Tensor:
    """Layer norm of [B, S, W] in float32, rounded to the dtype of `x`."""
    return F.layer_norm(x.to(scale.dtype), scale.shape, scale, bias, numerics.LAYER_NORM_EPS).to(x.dtype)
