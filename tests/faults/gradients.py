"""Faults in the backward pass alone: the forward pass gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import torch
import torch.nn.functional as F

import pi0_jax.models.gemma as jax_gemma
import pi0_jax.models.siglip as jax_siglip
import pi0_torch.models.flow as torch_flow
import pi0_torch.models.gemma as torch_gemma
import pi0_torch.models.layers as torch_layers
import pi0_torch.models.lora as torch_lora
import pi0_torch.models.pi0_fast as torch_fast
import pi0_torch.models.pi05 as torch_pi05
import pi0_torch.models.siglip as torch_siglip
import pi0_torch.models.vision_language as torch_vlm
from pi0.run_config import RecipeConfig
from pi0_eval.parity import frameworks
from tests.faults.mutation import RECIPE, Mutation, with_result

FIRST = ("gradients, all", "gradients, worst parameter")


def straight_through(right: Any, wrong: Any) -> Any:
    """The values of `right` with the gradient of `wrong`."""
    return wrong + (right - wrong).detach()


def torch_gradients(variant: str) -> Iterator[Mutation]:
    """Gradients that PyTorch's tree stops, or computes otherwise."""
    gelu, attend, rope = torch_layers.gelu, torch_layers.attention, torch_gemma.apply_rope
    normalize, residual, embed = torch_gemma.normalize, torch_gemma.gated_residual, torch_gemma.Expert.embed
    Linear, Norm = torch_layers.Linear.forward, torch_layers.LayerNorm.forward

    def each(name: str, *patches: tuple[Any, str, Any], first: tuple[str, ...] = FIRST) -> Mutation:
        return Mutation(name, variant, first, patches=patches, gradients=True)

    def bias_kept(s: Any, x: Any) -> Any:
        return Linear(s, x) if s.bias is None else straight_through(Linear(s, x), Linear(s, x) - s.bias)

    activations: dict[str, Callable[[Any], Any]] = {
        "GELU with SiLU's gradient": lambda x: straight_through(gelu(x), F.silu(x)),
        "GELU with the exact one's gradient": lambda x: straight_through(gelu(x), F.gelu(x)),
        "no gradient through GELU": lambda x: gelu(x).detach(),
    }
    for name, value in activations.items():
        yield each(f"{name}, vision", (torch_siglip, "gelu", value))
        yield each(f"{name}, Gemma", (torch_gemma, "gelu", value))
    attentions: dict[str, Callable[..., Any]] = {
        "no gradient to queries": lambda q, k, v, m=None: attend(q.detach(), k, v, m),
        "no gradient to keys": lambda q, k, v, m=None: attend(q, k.detach(), v, m),
        "no gradient to values": lambda q, k, v, m=None: attend(q, k, v.detach(), m),
        "gradient of logits not scaled": lambda q, k, v, m=None: attend(
            straight_through(q, q * q.shape[-1] ** 0.5), k, v, m),
    }  # fmt: skip
    for name, value in attentions.items():
        yield each(f"{name}, vision", (torch_siglip, "attention", value))
        yield each(f"{name}, Gemma", (torch_gemma, "attention", value))
    others: dict[str, tuple[Any, str, Any]] = {
        "no gradient past a residual": (torch_gemma, "gated_residual", lambda x, y, g: residual(x.detach(), y, g)),
        "no gradient through a branch": (torch_gemma, "gated_residual", lambda x, y, g: residual(x, y.detach(), g)),
        "RMS taken for a constant": (torch_gemma, "normalize", lambda x, d: straight_through(
            normalize(x, d), x * (normalize(x, d) / x).detach())),
        "RoPE's gradient not rotated": (torch_gemma, "apply_rope", lambda x, r, d: straight_through(rope(x, r, d), x)),
        "no gradient to the text embedding": (torch_gemma.Expert, "embed", lambda s, t: embed(s, t).detach()),
        "gradient of the text embedding not scaled": (torch_gemma.Expert, "embed", lambda s, t: straight_through(
            embed(s, t), s.embedding[t])),
        "layer norm without gradient": (torch_layers.LayerNorm, "forward", lambda s, x: straight_through(
            Norm(s, x), Norm(s, x.detach()))),
        "no gradient to biases": (torch_layers.Linear, "forward", bias_kept),
        "frozen vision": (torch_vlm.SigLIP, "forward", lambda s, x, stages=None, f=torch_siglip.SigLIP.forward: f(
            s, x, stages).detach()),
    }  # fmt: skip
    for name, one in others.items():
        yield each(name, one)
    if variant == "tiny_lora":
        make = torch_lora.LoRA.forward
        yield each("no gradient to LoRA", (torch_lora.LoRA, "forward", lambda s, x: make(s, x).detach()))
        yield each("gradient of LoRA not scaled", (torch_lora.LoRA, "forward", lambda s, x: straight_through(
            make(s, x), make(s, x) / s.scale)))  # fmt: skip
    if variant == "tiny_pi0_fast":
        logits = torch_gemma.Expert.logits
        yield each("no gradient to the embedding from logits", (torch_gemma.Expert, "logits", lambda s, x: (
            straight_through(logits(s, x), F.linear(x, s.embedding.detach())))))  # fmt: skip
        loss = torch_fast.Pi0Fast.compute_loss
    else:
        read = torch_flow.FlowModel.read_velocity
        yield each("gradient of the velocity twice", (torch_flow.FlowModel, "read_velocity", lambda s, x, h: (
            straight_through(read(s, x, h), 2 * read(s, x, h)))))  # fmt: skip
        loss = torch_flow.FlowModel.compute_loss
    if variant != RECIPE:
        half = with_result(loss, lambda x: straight_through(x, x / 2))
        owner = torch_fast.Pi0Fast if variant == "tiny_pi0_fast" else torch_flow.FlowModel
        yield each("half the loss's gradient", (owner, "compute_loss", half))
    if "pi05" in variant:
        adapt, condition = torch_gemma.AdaptiveRMSNorm.forward, torch_pi05.Pi05.condition
        norm = (torch_gemma.AdaptiveRMSNorm, "forward")
        yield each("no gradient to gates", (*norm, lambda s, x, c: ((y := adapt(s, x, c))[0], y[1].detach())))
        yield each("no gradient to the condition", (*norm, lambda s, x, c: adapt(s, x, c.detach())))
        yield each("no gradient to the time's MLP", (torch_pi05.Pi05, "condition", lambda s, t: (
            condition(s, t).detach())))  # fmt: skip
    if variant == RECIPE:
        yield from recipe_gradients(each)


def recipe_gradients(each: Callable[..., Mutation]) -> Iterator[Mutation]:
    """Insulation, and the weights of the loss's parts."""
    insulated, attend = torch_gemma.insulated_attention, torch_layers.attention

    def halfway(q: Any, k: Any, v: Any, mask: Any, split: int) -> Any:
        """Insulates keys alone."""
        first = attend(q[:, :split], k[:, :split], v[:, :split], mask[:, :split, :split])
        k = torch.cat([k[:, :split].detach(), k[:, split:]], dim=1)
        return torch.cat([first, attend(q[:, split:], k, v, mask[:, split:])], dim=1)

    def too_far(q: Any, k: Any, v: Any, mask: Any, split: int) -> Any:
        """Stops the second expert's own keys and values as well."""
        return insulated(q, *(torch.cat([x[:, :split], x[:, split:].detach()], dim=1) for x in (k, v)), mask, split)

    plain = lambda q, k, v, m, split: attend(q, k, v, m)  # noqa: E731
    yield each("no insulation", (torch_gemma, "insulated_attention", plain))
    yield each("insulation of keys alone", (torch_gemma, "insulated_attention", halfway))
    yield each("insulation of the action expert's tokens", (torch_gemma, "insulated_attention", too_far))
    for name, weight in (("flow's weight 1", {"flow_weight": 1.0}), ("weight of the text 2", {"text_weight": 2.0})):
        yield each(name, (frameworks, "RecipeConfig", partial(RecipeConfig, **weight)))


def jax_gradients(variant: str) -> Iterator[Mutation]:
    """Gradients that JAX's tree stops."""
    stop, gelu, residual = jax.lax.stop_gradient, jax_gemma.gelu, jax_gemma.gated_residual
    for name, one in {
        "no gradient through GELU, vision": (jax_siglip, "gelu", lambda x: stop(gelu(x))),
        "no gradient past a residual": (jax_gemma, "gated_residual", lambda x, y, g: residual(stop(x), y, g)),
    }.items():
        yield Mutation(name, variant, FIRST, "jax", patches=(one,), gradients=True)
