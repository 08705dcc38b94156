"""The programs of `pi0.policy.programs` as StableHLO, by jax.export from the JAX sampler; and running them.

The weights are arguments of a program, before its inputs, and are in a file of their own, which all programs share.
After its outputs a program gives its stages: a caller that does not use them does not compute them, since XLA removes
what is not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Bool, Float

from convert.formats.safetensors import read_safetensors, write_safetensors
from convert.tensors import Tensor
from pi0.policy.manifest import Manifest
from pi0.policy.programs import Program
from pi0.policy.rtc import Previous
from pi0.recording import recording, stages_of
from pi0.storage import below
from pi0_jax.models.vision_language import pixels
from pi0_jax.sampler import FusedModel, Inputs, Sampler

WEIGHTS = "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")


@partial(jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["config", "rtc"])
class Exported(FusedModel):
    """A sampler's model with all cameras in one array."""

    def embed_prefix(self, inputs: Inputs) -> tuple[Float[Array, "B S W"], Bool[Array, "B S"]]:
        """Tokens of the cameras, `images` [B, C, height, width, 3], then of the prompt; and which of them are valid."""
        text = self.embed_text(inputs["prompt"])
        tokens = self.embed_images(pixels(inputs["images"], self.config.runtime.dtype))
        image_masks = jnp.repeat(inputs["image_masks"], self.config.image_tokens, axis=1)
        return jnp.concatenate([tokens, text], axis=1), jnp.concatenate([image_masks, inputs["prompt_mask"]], axis=1)

    def _sample(self, inputs: Inputs) -> tuple[Any, ...]:
        return (self.sample_actions(inputs),)

    def _prefix(self, inputs: Inputs) -> tuple[Any, ...]:
        cache, logits, seen = self.read_prefix(inputs)
        return *_stacked(cache), seen, logits

    def _decode(self, inputs: Inputs) -> tuple[Any, ...]:
        token, position, seen = (inputs[name] for name in ("token", "position", "seen"))
        logits, cache = self.read_token(token, position, seen, inputs["slot"][0], self._cache(inputs, 0))
        return logits, *_stacked(cache)

    def _denoise(self, inputs: Inputs) -> tuple[Any, ...]:
        return (self.integrate(inputs, self._cache(inputs, self.suffix_length(inputs)), inputs["seen"]),)

    def _cache(self, inputs: Inputs, room: int) -> Any:
        pad = ((0, 0),) * 3 + ((0, room), (0, 0))
        dtype = self.config.runtime.dtype
        keys, values = (jnp.pad(inputs[name].astype(dtype), pad) for name in ("keys", "values"))
        return list(zip(keys, values, strict=True))


def _stacked(cache: Any) -> tuple[Array, Array]:
    """The keys and values of all layers, float32 [L, B, K, P, H]."""
    keys, values = (jnp.stack([layer[i] for layer in cache]).astype(jnp.float32) for i in (0, 1))
    return keys, values


def run_program(model: Exported, name: str, program: Program, arrays: Any, stages: list[str]) -> tuple[Any, ...]:
    """A program's outputs and its stages, whose names are added to `stages`."""
    inputs = dict(zip((x.name for x in program.inputs), arrays, strict=True))
    if model.rtc is not None and "noise" in inputs:
        inputs["previous"] = Previous(inputs.pop("previous_actions"), inputs.pop("previous_weights"))
    with recording() as operations:
        outputs = getattr(model, f"_{name}")(inputs)
    found = stages_of(operations)
    stages[:] = found
    return *outputs[: len(program.outputs)], *found.values()


def write_programs(
    sampler: Sampler, programs: Mapping[str, Program], ranges: Mapping[str, tuple[int, int]], folder: Path
) -> dict[str, tuple[str, list[str]]]:
    """Write each program and the weights; returns the file and the stages of each. `ranges`: see `Sizes.ranges`."""
    leaves, tree = jax.tree.flatten(sampler.weights)
    write_safetensors(folder / WEIGHTS, {f"{i:05d}": Tensor.of(np.asarray(leaf)) for i, leaf in enumerate(leaves)})
    abstract = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    made = {}
    for name, program in programs.items():
        used = list(dict.fromkeys(n for x in program.inputs for n in x.shape if isinstance(n, str)))
        bounds = [f"{axis} >= {ranges[axis][0]}" for axis in used] + [f"{axis} <= {ranges[axis][1]}" for axis in used]
        symbols = (
            dict(zip(used, export.symbolic_shape(",".join(used), constraints=bounds), strict=True)) if used else {}
        )
        shapes = [tuple(symbols.get(n, n) if isinstance(n, str) else n for n in x.shape) for x in program.inputs]
        inputs = [jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(shapes, program.inputs, strict=True)]
        stages: list[str] = []

        def call(weights: Any, *arrays: Any, name: str = name, program: Program = program, found: Any = stages) -> Any:
            model = Exported(jax.tree.unflatten(tree, weights), sampler.config, sampler.rtc)
            return run_program(model, name, program, arrays, found)

        with jax.default_matmul_precision("highest"):
            exported = export.export(jax.jit(call), platforms=PLATFORMS)(abstract, *inputs)
        file = f"{name}.stablehlo"
        (folder / file).write_bytes(exported.serialize())
        made[name] = file, stages
    return made


class StableHLORunner:
    """Runs the programs of an export to StableHLO."""

    def __init__(self, folder: Path, manifest: Manifest):
        self._manifest = manifest
        stored = sorted(read_safetensors(below(folder, WEIGHTS)).items())
        self._weights = [jnp.asarray(tensor.read(())) for _, tensor in stored]
        self._programs: dict[tuple[str, bool], Any] = {}
        self._exported = {
            name: export.deserialize(bytearray(below(folder, program.file).read_bytes()))
            for name, program in manifest.programs.items()
        }

    def run(self, program: str, inputs: dict[str, np.ndarray], stages: bool = False) -> dict[str, np.ndarray]:
        """The outputs of a program, and with `stages` these, each of the shape [...] that the manifest says."""
        found = self._manifest.programs[program]
        names = [x.name for x in found.program.outputs] + list(found.stages if stages else ())
        key = (program, stages)
        if key not in self._programs:
            call, count = self._exported[program].call, len(names)
            self._programs[key] = jax.jit(lambda *arrays: call(*arrays)[:count])
        results = self._programs[key](self._weights, *(inputs[x.name] for x in found.program.inputs))
        return {name: np.asarray(value) for name, value in zip(names, results, strict=True)}
