"""The programs of `pi0.policy.programs` as modules over a sampler's weights, to be traced by torch.export.

Axes: B batch, C cameras, S prefix tokens, P places of the cache, D written tokens, T action horizon, A action dim,
L layers, K key/value heads, H head dim, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pi0.policy.programs import Program
from pi0.policy.rtc import Previous
from pi0.recording import recording, stages_of
from pi0_torch.models.vision_language import pixels
from pi0_torch.sampler import Cache, FusedModel, Inputs, Sampler


class Exported(FusedModel):
    """A sampler's model with all cameras in one array, and a cache that is never written to in its place."""

    def __init__(self, sampler: Sampler):
        super().__init__(sampler.weights, sampler.config, sampler._attend, sampler.rtc)
        self.in_place = False

    def embed_prefix(self, inputs: Inputs) -> tuple[Float[Tensor, "B S W"], Bool[Tensor, "B S"]]:
        """Tokens of the cameras, `images` [B, C, height, width, 3], then of the prompt; and which of them are valid."""
        text, images = self.embed_text(inputs["prompt"]), inputs["images"]
        tokens = self.embed_images(pixels(images, self.config.runtime.dtype))
        image_masks = inputs["image_masks"].repeat_interleave(self.config.image_tokens, dim=1)
        return torch.cat([tokens, text], dim=1), torch.cat([image_masks, inputs["prompt_mask"]], dim=1)

    def cache(self, inputs: Inputs) -> Cache:
        """The cache of a program's inputs `keys` and `values` [L, B, K, P, H]."""
        dtype = getattr(torch, self.config.runtime.dtype)
        pairs = zip(inputs["keys"].to(dtype).unbind(), inputs["values"].to(dtype).unbind(), strict=True)
        return list(pairs)


class ProgramModule(nn.Module):
    """One program: tensors in and out, in the order of its `program`.

    With `stages`, an empty list, what the model records comes after the outputs, and the list has their names.
    """

    def __init__(self, model: Exported, name: str, program: Program, stages: list[str] | None = None):
        super().__init__()
        self.model, self.name, self.program, self.stages = model, name, program, stages

    def forward(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        """The outputs for inputs of the shapes [...] of the program, and its stages, whose names `stages` receives."""
        sizes: dict[str, int] = {}
        for x, array in zip(self.program.inputs, arrays, strict=True):
            for axis, size in zip(x.shape, array.shape, strict=True):
                if isinstance(axis, str):  # one symbol for each axis, of which all others are expressions
                    torch._check(sizes.setdefault(axis, size) == size)
        inputs: Inputs = dict(zip((x.name for x in self.program.inputs), arrays, strict=True))
        if self.model.rtc is not None and "noise" in inputs:
            inputs["previous"] = Previous(inputs.pop("previous_actions"), inputs.pop("previous_weights"))
        if self.stages is None:
            return self.run(inputs)
        with recording() as operations:
            outputs = self.run(inputs)
        found = stages_of(operations)
        self.stages[:] = found
        return *outputs, *found.values()

    def run(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The program's outputs, each of its shape [...]."""
        outputs = getattr(self, f"_{self.name}")(inputs)
        return tuple(outputs[: len(self.program.outputs)])

    def _sample(self, inputs: Inputs) -> tuple[Any, ...]:
        return (self.model.sample_actions(inputs),)

    def _prefix(self, inputs: Inputs) -> tuple[Any, ...]:
        cache, logits, seen = self.model.read_prefix(inputs)
        keys, values = (torch.stack([layer[i] for layer in cache]).float() for i in (0, 1))
        return keys, values, seen, logits

    def _decode(self, inputs: Inputs) -> tuple[Any, ...]:
        cache = [(k.clone(), v.clone()) for k, v in self.model.cache(inputs)]
        slot = inputs["slot"].long()
        logits = self.model.read_token(inputs["token"], inputs["position"], inputs["seen"], slot, cache)
        return logits, *(torch.stack([layer[i] for layer in cache]).float() for i in (0, 1))

    def _denoise(self, inputs: Inputs) -> tuple[Any, ...]:
        return (self.model.integrate(inputs, self.model.cache(inputs), inputs["seen"]),)


def examples(program: Program, sizes: dict[str, int], device: torch.device) -> tuple[Tensor, ...]:
    """Inputs of these sizes, each of its shape [...], to trace with: zeros, and masks that are all True."""
    made = []
    for x in program.inputs:
        shape = [sizes[n] if isinstance(n, str) else n for n in x.shape]
        fill = torch.ones if x.dtype == "bool" else torch.zeros
        made.append(fill(shape, dtype=getattr(torch, x.dtype), device=device))
    return tuple(made)
