"""Faults in what is sampled: Euler steps and decoding of the plain models, and the two frameworks' samplers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import jax.numpy as jnp
import numpy as np
import torch

import pi0_jax.sampler as jax_sampler
import pi0_torch.fused as torch_fused
import pi0_torch.models.layers as torch_layers
import pi0_torch.models.lora as torch_lora
import pi0_torch.models.pi05 as torch_pi05
import pi0_torch.models.vision_language as torch_vlm
import pi0_torch.sampler as torch_sampler
from pi0 import masks, numerics
from tests.faults.mutation import RECIPE, STEPS, Mutation, with_arguments, with_result

Fused = torch_sampler.FusedModel


def torch_samplers(variant: str) -> Iterator[Mutation]:
    """PyTorch's sampler, the plain model as it should be."""
    flow, text = variant != "tiny_pi0_fast", variant in ("tiny_pi0_fast", RECIPE)
    fill, project, embed_text = Fused.fill_cache, Fused.project, Fused.embed_text
    rotate, compact, bias_of = torch_sampler.rotation, torch_sampler.compact, torch_sampler.mask_bias
    rms, images = torch_sampler.rms_norm, Fused.embed_images

    def each(name: str, *patches: tuple[Any, str, Any], equivalent: bool = False, late: bool = False) -> Mutation:
        first = () if equivalent else ("actions",) if late or not text else ("first logits",)
        return Mutation(name, variant, first, patches=patches, sampler=True)

    def other_text(observation: Any, *args: Any) -> Any:
        cut = compact(observation, *args)
        return replace(cut, tokenized_prompt_mask=cut.tokenized_prompt_mask & (
            np.arange(cut.tokenized_prompt.shape[1]) > 0))  # fmt: skip

    def fewer_cameras(observation: Any, *args: Any) -> Any:
        cut = compact(observation, *args)
        keys = list(cut.images)[:1]
        parts = {part: {key: getattr(cut, part)[key] for key in keys} for part in ("images", "image_masks")}
        return replace(cut, **parts)

    def shifted(positions: Any, *args: Any) -> Any:
        """Positions of what is read after the prefix, one more."""
        return rotate(positions + (positions.shape[1] < 8), *args)

    def of_row(s: Any, *args: Any) -> Any:
        cache, logits = fill(s, *args)
        return [(k.roll(1, 0), v) for k, v in cache], logits

    table: dict[str, tuple[Any, str, Any]] = {
        "no first token of the prompt": (torch_sampler, "compact", other_text),
        "one camera alone": (torch_sampler, "compact", fewer_cameras),
        "exact GELU": (torch_sampler, "gelu", lambda x: torch.nn.functional.gelu(x)),
        "RMS norm in float32": (torch_sampler, "rms_norm", lambda x, n: rms(x.float().double(), n)),
        "text not scaled": (Fused, "embed_text", lambda s, t: embed_text(s, t) / s.config.paligemma.width**0.5),
        "image tokens reversed": (Fused, "embed_images", lambda s, x: images(s, x).flip(1)),
        "padding is attended to": (torch_sampler, "mask_bias", lambda m, c: bias_of(torch.ones_like(m), c)),
        "keys rotated as queries of the next token": (Fused, "project", lambda s, x, w, g, r: (
            (p := project(s, x, w, g, r))[0], p[1].roll(1, 2), p[2])),
    }  # fmt: skip
    cached: dict[str, tuple[Any, str, Any]] = {  # what is read after the prefix
        "positions after the prefix one more": (torch_sampler, "rotation", shifted),
        "the cache's keys of another row": (Fused, "fill_cache", of_row),
        "the cache's layers reversed": (Fused, "fill_cache", lambda s, *a: (
            (r := fill(s, *a))[0][::-1], r[1])),
    }  # fmt: skip
    for name, one in table.items():
        yield each(name, one)
    later = {"tiny_pi0_fast": "tokens", RECIPE: "subtask"}.get(variant, "actions")
    for name, one in cached.items():
        yield Mutation(name, variant, (later,), patches=(one,), sampler=True)
    if variant == "tiny_lora":
        merged = torch_layers.Linear.merged_weight
        linear = torch_layers.Linear
        yield each("LoRA not merged", (linear, "merged_weight", lambda s: s.weight))
        yield each("LoRA merged twice", (linear, "merged_weight", lambda s: 2 * merged(s) - s.weight))
        yield each("LoRA merged in bfloat16", (linear, "merged_weight", lambda s: merged(s).bfloat16().double()))
        update = torch_lora.LoRA.update
        yield each("LoRA merged without its scale", (torch_lora.LoRA, "update", lambda s: update(s) / s.scale))
    if flow:
        yield from torch_integration(variant, partial(each, late=True))


def torch_integration(variant: str, each: Callable[..., Mutation]) -> Iterator[Mutation]:
    """Euler steps of PyTorch's sampler."""
    integrate, denoise, project = Fused.integrate, Fused.denoise, Fused.project
    adaptive = "pi05" in variant
    times, suffix = numerics.euler_times, torch_fused.suffix_weights

    def last(s: Any, *args: Any, step: int, **more: Any) -> Any:
        return denoise(s, *args, step=step, **more) * (step < len(s.weights["steps"]["bias"][0]) - 1)

    def stale(s: Any, cache: Any, *args: Any, step: int, **more: Any) -> Any:
        """Keys and values of the suffix as they were in the first step."""
        memory: dict[int, Any] = s.__dict__.setdefault("memory", {})

        def kept(self: Any, x: Any, w: Any, gemma: Any, rope: Any) -> Any:
            q, *new = project(self, x, w, gemma, rope)
            return q, *memory.setdefault(id(w), new)

        if step == 0:
            memory.clear()
        Fused.project = kept  # type: ignore[method-assign]
        try:
            return denoise(s, cache, *args, step=step, **more)
        finally:
            Fused.project = project  # type: ignore[method-assign]

    def doubled(s: Any, cache: Any, *args: Any, **more: Any) -> Any:
        """The suffix takes the places of the prefix's last tokens as well."""
        length = s.suffix_length({"noise": args[1]})
        for k, v in cache:
            for x in (k, v):
                x[:, :, -2 * length : -length] = x[:, :, -length:]
        return denoise(s, cache, *args, **more)

    def late(*args: Any, **more: Any) -> Any:
        with patch.object(numerics, "euler_times", lambda n: times(n) - np.float32(1 / n)):
            return suffix(*args, **more)

    def still(weights: dict[str, Any]) -> dict[str, Any]:
        """The norms of each step are those of the first."""
        steps = {name: x if name == "bias" else of_first(x) for name, x in weights["steps"].items()}
        return weights | {"steps": steps}

    def of_first(norms: Any) -> Any:
        if isinstance(norms, torch.Tensor):
            return norms[:1].expand_as(norms)
        return type(norms)(of_first(x) for x in norms)

    yield each("no last Euler step", (Fused, "denoise", last))
    yield each("times one step late", (torch_fused, "suffix_weights", late))
    yield each("keys and values of the first step in all", (Fused, "denoise", stale))
    yield each("the suffix twice in the cache", (Fused, "denoise", doubled))
    copied = "a copy of the cache for each step: each writes the suffix's places anew"
    fresh = with_arguments(denoise, cache=lambda c: [(k.clone(), v.clone()) for k, v in c])
    yield each(copied, (Fused, "denoise", fresh), equivalent=True)
    yield each("integration attends to padding", (Fused, "integrate", with_arguments(integrate, seen=torch.ones_like)))
    rounded = with_arguments(integrate, inputs=lambda x: x | {"noise": x["noise"].bfloat16().double()})
    yield each("noise in bfloat16", (Fused, "integrate", rounded))
    yield each("velocity a millionth larger", (Fused, "denoise", with_result(denoise, lambda v: v * 1.000001)))
    norms = "the first step's norms in all" + ("" if adaptive else ": π0's do not depend on the time")
    yield each(norms, (torch_fused, "suffix_weights", with_result(suffix, still)), equivalent=not adaptive)
    yield each("the first step's time in all", (Fused, "denoise", with_arguments(denoise, step=lambda i: 0)))


def jax_samplers(variant: str) -> Iterator[Mutation]:
    """JAX's sampler."""
    integrate, rms = jax_sampler.FusedModel.integrate, jax_sampler.rms_norm
    bias_of, read_logits = jax_sampler.mask_bias, jax_sampler.FusedModel.read_logits

    def each(name: str, one: tuple[Any, str, Any], late: bool = False) -> Mutation:
        first = ("first logits",) if variant in ("tiny_pi0_fast", RECIPE) and not late else ("actions",)
        return Mutation(name, variant, first, "jax", patches=(one,), sampler=True)

    yield each("padding is attended to", (jax_sampler, "mask_bias", lambda m: bias_of(jnp.ones_like(m))))
    if variant == "tiny_pi0_fast":
        shift = lambda s, x: jnp.roll(read_logits(s, x), 1, -1)  # noqa: E731
        yield each("logits of the token before", (jax_sampler.FusedModel, "read_logits", shift))
    else:
        seen = with_arguments(integrate, seen=jnp.ones_like)
        yield each("integration attends to padding", (jax_sampler.FusedModel, "integrate", seen), late=True)
        low = lambda x, n: rms(x.astype(jnp.float32).astype(x.dtype), n)  # noqa: E731
        yield each("RMS norm in float32", (jax_sampler, "rms_norm", low))


def decoding(variant: str) -> Iterator[Mutation]:
    """Text of the plain model in PyTorch: π0-FAST's actions, and π0.5's subtask."""
    if variant not in ("tiny_pi0_fast", RECIPE):
        return
    logits, text = ("subtask logits", "subtask") if variant == RECIPE else ("decoded logits", "tokens")
    decode, read_token = torch_vlm.decode, torch_vlm.VisionLanguageModel.read_token
    whole = torch_vlm.VisionLanguageModel.decode

    def each(name: str, change: Callable[..., Any], first: str = logits, equivalent: bool = False) -> Mutation:
        """`change` is called with decode's arguments, `read_token` apart."""

        def changed(start: Any, cache: Any, valid: Any, place: int, steps: int, read: Any, **options: Any) -> Any:
            return change(start, cache, valid, place, steps, read, options)

        stages = () if equivalent else (first,)
        return Mutation(name, variant, stages, patches=((torch_vlm, "decode", changed),))

    def reading(edit: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        """Decoding whose calls of `read_token` are changed."""

        def change(start: Any, cache: Any, valid: Any, place: int, steps: int, read: Any, options: Any) -> Any:
            return decode(start, cache, valid, place, steps, lambda *a: read(*edit(place, *a)), **options)

        return change

    def scaled(factor: float) -> Callable[..., Any]:
        return lambda x, c, v, p, n, read, o: decode(x * factor, c, v, p, n, lambda *a: read(*a) * factor, **o)

    def ending(token: int) -> Callable[..., Any]:
        return lambda x, c, v, p, n, read, o: decode(x, c, v, p, n, read, **(o | {"eos_token": token}))

    def last_of_ties(x: Any, c: Any, v: Any, p: int, n: int, read: Any, o: Any) -> Any:
        with patch.object(torch.Tensor, "argmax", lambda x, dim: x.shape[dim] - 1 - torch.argmax(x.flip(dim), dim)):
            return decode(x, c, v, p, n, read, **o)

    def drawn(x: Any, c: Any, v: Any, p: int, n: int, read: Any, o: Any) -> Any:
        return decode(x, c, v, p, n, read, **(o | {"temperature": 1.0, "rng": torch.Generator().manual_seed(0)}))

    skip = lambda k: lambda x, c, v, p, n, r, o: decode(x, c, v, p, n, r, **(o | {"skipped": k}))  # noqa: E731
    right = 0 if variant == RECIPE else 1
    for k in {0, 1, 2} - {right}:
        yield each(f"{k} positions skipped", skip(k))
    yield each("positions stand still", reading(lambda place, t, pos, seen, slot, c: (
        t, pos - (slot - place), seen, slot, c)))  # fmt: skip
    yield each("all tokens in one place of the cache", reading(lambda place, t, pos, seen, slot, c: (
        t, pos, seen, torch.full_like(slot, place), c)))  # fmt: skip
    yield each("a token does not attend to itself", reading(lambda place, t, pos, seen, slot, c: (
        t, pos, seen & (torch.arange(seen.shape[1]) != slot), slot, c)))  # fmt: skip
    yield each("a token attends to the first alone", reading(lambda place, t, pos, seen, slot, c: (
        t, pos, seen & (torch.arange(seen.shape[1]) <= place), slot, c)))  # fmt: skip
    yield each("the token before is read again", reading(lambda place, t, pos, seen, slot, c: (
        t.roll(1, 0), pos, seen, slot, c)))  # fmt: skip
    yield each("places of the cache that are empty are attended to", reading(lambda place, t, pos, seen, slot, c: (
        t, pos, seen | (torch.arange(seen.shape[1]) > slot), slot, c)))  # fmt: skip
    yield each("logits of temperature 2", scaled(0.5), first="first logits")
    yield each(
        "first logits in float32",
        lambda x, c, v, p, n, r, o: decode(x.float().double(), c, v, p, n, r, **o),
        first="first logits",
    )
    yield each("drawn at temperature 1", drawn, first=text)
    yield each("the last of equal logits: no two are equal", last_of_ties, equivalent=True)
    yield each("never ends", ending(-1))
    yield each("ends with another token", ending(2))
    yield each("the prompt's last token is left out", lambda x, c, v, p, n, r, o: decode(
        x, c, v & (v.cumsum(1) < v.sum(1, keepdim=True)), p, n, r, **o))  # fmt: skip
    before = lambda s, out, *a, **o: whole(s, out.roll(1, 1), *a, **o)  # noqa: E731
    yield Mutation("starts from the token before", variant, ("first logits",), patches=(
        (torch_vlm.VisionLanguageModel, "decode", before),))  # fmt: skip
    wrong = lambda s, token, *a: read_token(s, token.clamp(max=255), *a)  # noqa: E731
    yield Mutation("token ids cut to 8 bits", variant, (logits,), patches=(
        (torch_vlm.VisionLanguageModel, "read_token", wrong),))  # fmt: skip


def recipe(variant: str) -> Iterator[Mutation]:
    """π0.5's recipe and subtask in PyTorch: masks, positions, losses."""
    if variant != RECIPE:
        return
    attention, positions, Pi05 = masks.attention_mask, masks.positions, torch_pi05.Pi05
    losses, parts, written, integrate = Pi05.text_losses, Pi05.loss_parts, torch_pi05.written, Pi05.integrate
    groups_of = Pi05.prefix_groups

    def each(name: str, stage: str, *patches: tuple[Any, str, Any]) -> Mutation:
        return Mutation(name, variant, (stage,) if stage else (), patches=patches)

    def with_groups(change: Callable[[Any], Any]) -> tuple[Any, str, Any]:
        return (masks, "attention_mask", lambda g, v: attention(change(g), v))

    def see(query: int, key: int) -> tuple[Any, str, Any]:
        def mask(g: Any, v: Any) -> Any:
            more = (g == query)[:, :, None] & (g == key)[:, None, :] & v[:, :, None] & v[:, None, :]
            return attention(g, v) | more

        return (masks, "attention_mask", mask)

    def hide(query: int, key: int) -> tuple[Any, str, Any]:
        def mask(g: Any, v: Any) -> Any:
            return attention(g, v) & ~((g == query)[:, :, None] & (g == key)[:, None, :])

        return (masks, "attention_mask", mask)

    prompt, subtask, fast, actions = masks.GROUPS
    yield each("actions attend to FAST tokens", "flow loss", see(actions, fast))
    yield each("the prompt attends to the subtask", "text loss", see(prompt, subtask))
    yield each("the subtask attends to what follows in it", "text loss", see(subtask, subtask))
    yield each("FAST tokens do not attend to the subtask", "fast loss", hide(fast, subtask))
    yield each("actions do not attend to the subtask", "flow loss", hide(actions, subtask))
    yield each("actions are causal", "flow loss", (masks, "attention_mask", lambda g, v: (
        attention(g, v) & ~((g == actions)[:, :, None] & (g == actions)[:, None] &
                            torch.ones_like(attention(g, v)).triu(1)))))  # fmt: skip
    count = lambda g, v: v.cumsum(1) - 1  # noqa: E731
    yield each("actions' positions count FAST tokens", "flow loss", (masks, "positions", count))
    prefix = lambda g, v: positions(g, v) + (g == fast)  # noqa: E731
    yield each("positions of FAST tokens one more", "fast loss", (masks, "positions", prefix))

    def shifted(s: Any, observation: Any, out: Any) -> Any:
        return losses(s, observation, out.roll(1, 1))

    def padded(s: Any, observation: Any, out: Any) -> Any:
        return losses(s, replace(observation, tokenized_prompt_mask=torch.ones_like(
            observation.tokenized_prompt_mask)), out)  # fmt: skip

    over_batch = lambda s, o, out: {n: x.mean().expand_as(x) for n, x in losses(s, o, out).items()}  # noqa: E731
    swapped = lambda s, o, out: dict(zip(("fast", "text"), losses(s, o, out).values(), strict=True))  # noqa: E731
    yield each("losses of the token before", "text loss", (Pi05, "text_losses", shifted))
    yield each("loss of padding", "fast loss", (Pi05, "text_losses", padded))
    yield each("mean of the batch", "text loss", (Pi05, "text_losses", over_batch))
    yield each("text's and FAST's losses swapped", "text loss", (Pi05, "text_losses", swapped))
    all_act = with_arguments(parts, observation=lambda o: replace(o, has_actions=None))
    yield each("loss of rows without actions", "flow loss", (Pi05, "loss_parts", all_act))
    yield each("the text has no groups", "text loss", (Pi05, "prefix_groups", lambda s, o: (
        groups_of(s, replace(o, token_group=None)))))  # fmt: skip
    ends = lambda t, eos: written(t, eos) & (t != eos)  # noqa: E731
    yield each("actions do not attend to the subtask's end", "actions", (torch_pi05, "written", ends))
    nothing = with_arguments(integrate, seen=lambda x: x & (torch.arange(x.shape[1]) < x.shape[1] - STEPS))
    yield each("sampled actions do not attend to the subtask", "actions", (Pi05, "integrate", nothing))
