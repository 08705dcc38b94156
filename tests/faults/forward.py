"""Faults in the code of the forward pass, in PyTorch's tree and in JAX's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F

import pi0_jax.models.flow as jax_flow
import pi0_jax.models.gemma as jax_gemma
import pi0_jax.models.siglip as jax_siglip
import pi0_jax.models.vision_language as jax_vlm
import pi0_torch.models.flow as torch_flow
import pi0_torch.models.gemma as torch_gemma
import pi0_torch.models.layers as torch_layers
import pi0_torch.models.lora as torch_lora
import pi0_torch.models.pi0_fast as torch_fast
import pi0_torch.models.siglip as torch_siglip
import pi0_torch.models.vision_language as torch_vlm
from pi0 import masks
from tests.faults.mutation import Mutation, with_arguments, with_result


def last_rows(mask: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement of `block_mask`, of which `last` takes the last queries."""
    return lambda blocks, valid, last=None: mask(blocks, valid)[:, slice(None if last is None else -last, None)]


def torch_code(variant: str) -> Iterator[Mutation]:
    """Functions of PyTorch's model."""
    flow, adaptive = variant != "tiny_pi0_fast", variant == "tiny_pi05"
    vision, prefix = "vision layer 0", "prefix layer 0"
    gelu, attend, rope, rotate = torch_layers.gelu, torch_layers.attention, torch_gemma.apply_rope, torch_gemma.rotation
    normalize, residual, pixels = torch_gemma.normalize, torch_gemma.gated_residual, torch_vlm.pixels
    block_mask, embed = masks.block_mask, torch_gemma.Expert.embed

    def attention(change: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k, v, mask=None: change(q, k, v, mask)

    def soft(dtype: torch.dtype) -> Callable[..., Any]:
        def rounded(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
            with patch.object(torch.Tensor, "softmax", lambda x, dim: torch.softmax(x.to(dtype), dim).to(x.dtype)):
                return attend(q, k, v, mask)

        return rounded

    def each(name: str, stage: str, *patches: tuple[Any, str, Any]) -> Mutation:
        return Mutation(name, variant, (stage,) if stage else (), patches=patches)

    gelus = {
        "exact GELU": lambda x: F.gelu(x),
        "SiLU for GELU": F.silu,
        "ReLU for GELU": F.relu,
        "quick GELU": lambda x: x * torch.sigmoid(1.702 * x),
        "GELU in float32": lambda x: gelu(x.float()).to(x.dtype),
    }
    for name, value in gelus.items():
        yield each(f"{name}, vision", vision, (torch_siglip, "gelu", value))
        yield each(f"{name}, Gemma", prefix, (torch_gemma, "gelu", value))
    attentions: dict[str, Callable[..., Any]] = {
        "softmax in float32": soft(torch.float32),
        "softmax in bfloat16": soft(torch.bfloat16),
        "logits not scaled": attention(lambda q, k, v, m: attend(q * q.shape[-1] ** 0.5, k, v, m)),
        "logits scaled by 1/H": attention(lambda q, k, v, m: attend(q * q.shape[-1] ** -0.5, k, v, m)),
        "queries and keys in float32": attention(
            lambda q, k, v, m: attend(q.float().double(), k.float().double(), v, m)
        ),
        "heads reversed": attention(lambda q, k, v, m: attend(q, k, v, m).flip(2)),
        "values shifted by a token": attention(lambda q, k, v, m: attend(q, k, v.roll(1, 1), m)),
    }
    for name, value in attentions.items():
        yield each(f"{name}, vision", vision, (torch_siglip, "attention", value))
        yield each(f"{name}, Gemma", prefix, (torch_gemma, "attention", value))
    grouped = attention(lambda q, k, v, m: attend(q, k.flip(2), v.flip(2), m))
    yield each("key heads in the wrong order", prefix, (torch_gemma, "attention", grouped))
    yield each("no mask", prefix, (torch_gemma, "attention", attention(lambda q, k, v, m: attend(q, k, v))))
    yield each("mask shifted by a token", prefix, (torch_gemma, "attention", attention(
        lambda q, k, v, m: attend(q, k, v, m.roll(1, 2)))))  # fmt: skip

    def interleaved(x: Any, rotation: Any, dtype: str) -> Any:
        paired = torch.cat([x[..., ::2], x[..., 1::2]], -1)
        y = rope(paired, rotation, dtype)
        return torch.stack(y.chunk(2, -1), -1).flatten(-2)

    ropes = {
        "RoPE of interleaved pairs": (torch_gemma, "apply_rope", interleaved),
        "no RoPE": (torch_gemma, "apply_rope", lambda x, r, dtype: x),
        "RoPE in float32": (torch_gemma, "apply_rope", lambda x, r, d: rope(x.float(), r, "float32").to(x.dtype)),
        "positions in steps of 2": (torch_gemma, "rotation", lambda p, h, d: rotate(2 * p, h, d)),
        "angles in float32": (torch_gemma, "rotation", lambda p, h, d: [x.double() for x in rotate(p, h, "float32")]),
        "padded tokens have positions": (torch_gemma, "rotation", lambda p, h, d: rotate(
            p + (torch.arange(p.shape[1]) - p) * (p.shape[1] > 6), h, d)),
    }  # fmt: skip
    for name, one in ropes.items():
        if name == "padded tokens have positions" and not flow:
            yield each(f"{name}: π0-FAST has padding at the end alone", "", one)
        else:
            yield each(name, prefix, one)
    shifted = (torch_gemma, "rotation", lambda p, h, d: rotate(p + 1, h, d))
    yield each("positions from 1: RoPE depends on differences alone", "", shifted)
    norms = {
        "RMS norm takes the mean away": lambda x, d: normalize(x - x.mean(-1, keepdim=True), d),
        "RMS norm in float32": lambda x, d: normalize(x.float(), "float32").to(x.dtype),
        "RMS norm by the sum": lambda x, d: normalize(x, d) * x.shape[-1] ** -0.5,
    }
    for name, value in norms.items():
        yield each(name, prefix, (torch_gemma, "normalize", value))
    yield each("no residual", prefix, (torch_gemma, "gated_residual", lambda x, y, g: residual(0 * x, y, g)))
    swapped = lambda self, x: self.down(torch_gemma.gelu(self.up(x)) * self.gate(x))  # noqa: E731
    yield each("gate and up swapped", prefix, (torch_gemma.MLP, "forward", swapped))
    ungated = lambda self, x: self.down(self.gate(x) * self.up(x))  # noqa: E731
    yield each("no activation", prefix, (torch_gemma.MLP, "forward", ungated))
    post = lambda self, x: self.attention_norm(x) + self.attention(x)  # noqa: E731
    yield each("vision's norm after the residual", vision, (torch_siglip.Block, "forward", post))
    plain = lambda self, x, c: ((normalize(x, self.dtype) * self.scale), None)  # noqa: E731
    yield each("norm's scale without 1 +", prefix, (torch_gemma.RMSNorm, "forward", plain))
    embeds = {
        "text not scaled": lambda self, t: embed(self, t) / self.embedding.shape[-1] ** 0.5,
        "text scaled by bfloat16's root": lambda self, t: self.embedding[t] * torch.tensor(
            self.embedding.shape[-1] ** 0.5).bfloat16().double(),
        "text shifted by a token": lambda self, t: embed(self, t).roll(1, 1),
    }  # fmt: skip
    for name, value in embeds.items():
        yield each(name, "prefix tokens", (torch_gemma.Expert, "embed", value))
    images = {
        "pixels over 256": lambda x, d: pixels(x, d) * 255 / 256,
        "pixels from 0 to 1": lambda x, d: (pixels(x, d) + 1) / 2,
        "BGR": lambda x, d: pixels(x, d).flip(-1),
        "image transposed in rows": lambda x, d: pixels(x, d).flip(1),
        "pixels in float32": lambda x, d: pixels(x, "float32").double(),
        "pixels in bfloat16": lambda x, d: pixels(x, "float32").bfloat16().double(),
    }
    for name, value in images.items():
        yield each(name, vision, (torch_vlm, "pixels", value))
    module = torch_flow if flow else torch_fast
    tests_of_masks = {
        "blocks attend to later ones": lambda b, v: block_mask(-b, v),
        "no token attends to itself": lambda b, v: block_mask(b, v) & ~torch.eye(v.shape[1], dtype=torch.bool),
        "all causal": lambda b, v: block_mask(b, v).tril(),
        "padding is attended to": lambda b, v: block_mask(b, torch.ones_like(v)),
        "mask off by one": lambda b, v: (
            block_mask(b, v) & ~torch.roll(~v, -1, 1)[:, None] | torch.eye(v.shape[1]).bool()
        ),
    }
    for name, change in tests_of_masks.items():
        # Of π0-FAST's training rows nobody but itself attends to the last token; of its prompts all do.
        stage = "first logits" if name == "mask off by one" and not flow else prefix
        yield each(name, stage, (module, "block_mask", last_rows(change)))
    if variant == "tiny_lora":
        make = torch_lora.LoRA.forward
        yield each("LoRA not scaled", prefix, (torch_lora.LoRA, "forward", lambda s, x: make(s, x) / s.scale))
        yield each("LoRA twice", prefix, (torch_lora.LoRA, "forward", lambda s, x: 2 * make(s, x)))
        yield each("no LoRA", prefix, (torch_lora.LoRA, "forward", lambda s, x: 0 * make(s, x)))
        rounded = lambda s, x: make(s, x).bfloat16().double()  # noqa: E731
        yield each("LoRA rounded to bfloat16", prefix, (torch_lora.LoRA, "forward", rounded))
    if adaptive:
        adapt = torch_gemma.AdaptiveRMSNorm.forward

        def gates(change: Callable[..., Any]) -> tuple[Any, str, Any]:
            return (torch_gemma.AdaptiveRMSNorm, "forward", lambda s, x, c: change(*adapt(s, x, c)))

        yield each("gate 1 larger", "suffix layer 0", gates(lambda x, g: (x, 1 + g)))
        yield each("gate through a sigmoid", "suffix layer 0", gates(lambda x, g: (x, g.sigmoid())))
        yield each("no gate", "suffix layer 0", gates(lambda x, g: (x, None)))
        parts = lambda s, c: s.modulation(c)[:, None].chunk(3, -1)  # noqa: E731
        orders = {
            "shift and scale swapped": lambda s, x, c: (
                normalize(x, s.dtype) * (1 + parts(s, c)[1]) + parts(s, c)[0], parts(s, c)[2]),
            "shift and gate swapped": lambda s, x, c: (
                normalize(x, s.dtype) * (1 + parts(s, c)[0]) + parts(s, c)[2], parts(s, c)[1]),
            "no 1 + at the scale": lambda s, x, c: (
                normalize(x, s.dtype) * parts(s, c)[0] + parts(s, c)[1], parts(s, c)[2]),
        }  # fmt: skip
        for name, value in orders.items():
            yield each(name, "suffix layer 0", (torch_gemma.AdaptiveRMSNorm, "forward", value))
    if flow:
        yield from flow_code(variant)
    else:
        logits = torch_gemma.Expert.logits
        yield each("logits not of the norm", "logits", (torch_gemma.Expert, "logits", lambda s, x: logits(s, x) * 1.01))
        yield each("logits in float32", "logits", (torch_gemma.Expert, "logits", lambda s, x: logits(s, x).float()))


def flow_code(variant: str) -> Iterator[Mutation]:
    """What π0 and π0.5 have in PyTorch beside the language model."""
    time_stage = "suffix layer 0" if variant == "tiny_pi05" else "suffix tokens"
    Flow, embed_time, interpolate = torch_flow.FlowModel, torch_flow.embed_time, torch_flow.interpolate
    read, integrate, blocks, prefix = Flow.read_velocity, Flow.integrate, Flow.suffix_blocks, Flow.read_prefix

    def each(name: str, stage: str, *patches: tuple[Any, str, Any]) -> Mutation:
        return Mutation(name, variant, (stage,) if stage else (), patches=patches)

    def halves(t: Any, w: int, p: Any, d: str) -> Any:
        return embed_time(t, w, p, d).roll(w // 2, -1)

    yield each("cosine before sine", time_stage, (torch_flow, "embed_time", halves))
    single = lambda t, w, p, d: embed_time(t, w, p, "float32").double()  # noqa: E731
    yield each("time in float32", time_stage, (torch_flow, "embed_time", single))
    late = lambda t, w, p, d: embed_time(1 - t, w, p, d)  # noqa: E731
    yield each("time from data to noise", time_stage, (torch_flow, "embed_time", late))
    longer = lambda t, w, p, d: embed_time(t, w, (4e-3, 4.001), d)  # noqa: E731
    yield each("longest period 4.001", time_stage, (torch_flow, "embed_time", longer))
    swapped = lambda a, n, *more: (interpolate(n, a, *more)[0], *interpolate(a, n, *more)[1:])  # noqa: E731
    yield each("actions and noise swapped", "suffix tokens", (torch_flow, "interpolate", swapped))
    negative = with_result(interpolate, lambda r: (r[0], -r[1], *r[2:]))
    yield each("velocity towards the data", "loss", (torch_flow, "interpolate", negative))
    early = lambda s, x, h: read(s, x[:, :h], h)  # noqa: E731
    if variant == "tiny_pi05":
        yield each("velocity of the first tokens: there is no other token", "", (Flow, "read_velocity", early))
    else:
        yield each("velocity of the first tokens", "velocity", (Flow, "read_velocity", early))
        one = lambda s, h: blocks(s, h) * 0 + 1  # noqa: E731
        yield each("the state attends to actions", "suffix layer 0", (Flow, "suffix_blocks", one))
    causal = lambda s, h: torch.arange(len(blocks(s, h))) + 1  # noqa: E731
    yield each("actions are causal", "suffix layer 0", (Flow, "suffix_blocks", causal))
    steps: dict[str, dict[str, Callable[[Any], Any]]] = {
        "sampling attends to padding": {"seen": torch.ones_like},
        "cache of other layers": {"cache": lambda c: c[::-1]},
        "cache of another row": {"cache": lambda c: [(k.roll(1, 0), v) for k, v in c]},
        "one Euler step fewer": {"num_steps": lambda n: n - 1},
        "noise negated": {"noise": lambda n: -n},
    }
    for name, changes in steps.items():
        yield each(name, "actions", (Flow, "integrate", with_arguments(integrate, **changes)))
    rounded = with_result(prefix, lambda r: (r[0], [(k.float().double(), v) for k, v in r[1]]))
    yield each("cache in float32", "actions", (Flow, "read_prefix", rounded))


def jax_code(variant: str) -> Iterator[Mutation]:
    """Functions of JAX's model."""
    rope, rotate, normalize, pixels = (
        jax_gemma.apply_rope,
        jax_gemma.rotation,
        jax_gemma.normalize,
        jax_vlm.pixels,
    )

    def each(name: str, stage: str, *patches: tuple[Any, str, Any]) -> Mutation:
        return Mutation(name, variant, (stage,), "jax", patches=patches)

    yield each(
        "exact GELU, vision", "vision layer 0", (jax_siglip, "gelu", lambda x: jax.nn.gelu(x, approximate=False))
    )
    yield each("exact GELU, Gemma", "prefix layer 0", (jax_gemma, "gelu", lambda x: jax.nn.gelu(x, approximate=False)))
    yield each("no RoPE", "prefix layer 0", (jax_gemma, "apply_rope", lambda x, r, d: x))
    back = lambda x, r, d: rope(x[..., ::-1], r, d)[..., ::-1]  # noqa: E731
    yield each("RoPE reversed", "prefix layer 0", (jax_gemma, "apply_rope", back))
    single = lambda p, h, d: tuple(x.astype(jnp.float64) for x in rotate(p, h, "float32"))  # noqa: E731
    yield each("angles in float32", "prefix layer 0", (jax_gemma, "rotation", single))
    low = lambda x, d: normalize(x.astype(jnp.float32), "float32").astype(x.dtype)  # noqa: E731
    yield each("RMS norm in float32", "prefix layer 0", (jax_gemma, "normalize", low))
    yield each("no residual", "prefix layer 0", (jax_gemma, "gated_residual", lambda x, y, g: y))
    yield each("BGR", "vision layer 0", (jax_vlm, "pixels", lambda x, d: pixels(x, d)[..., ::-1]))
    if variant != "tiny_pi0_fast":
        embed, stage = jax_flow.embed_time, "suffix layer 0" if variant == "tiny_pi05" else "suffix tokens"
        late = lambda t, w, p, d: embed(1 - t, w, p, d)  # noqa: E731
        yield each("time from data to noise", stage, (jax_flow, "embed_time", late))
