"""Run models of any size layer by layer, with one layer's weights in memory, each fed with what A computed before it.

Every slice is the model's own code on a model of one layer: what comes before the layer is replaced by what A recorded
there, in the compute dtype. The functions below are for models of either framework.

Axes: B batch, S prefix tokens, L layers, K key/value heads, H head dim, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from convert.checkpoints import Checkpoint
from convert.tensors import Tensor, pieces
from pi0.config import PROOF_DTYPE, ModelConfig
from pi0.observation import Observation
from pi0_eval.parity.frameworks import XLA_OPTIONS, Results, exact_matmuls, jax_settings, widened
from pi0_eval.parity.inputs import Inputs
from pi0_eval.parity.sides import Side

Inputs4 = tuple[Any, Any, Any, Any]  # observation, actions, noise, time
Function = Callable[..., dict[str, Any]]  # of a model, its inputs and what is fed to it
Step = Callable[[np.ndarray, float, int, Any, np.ndarray, np.ndarray], np.ndarray]  # `Run.euler_step`
Params = Iterable[tuple[str, np.ndarray]]
Four = tuple[Results, Results, Results, Results]  # A and B in float64, A and B in their dtypes
ROWS = 1 << 15  # of the vocabulary at a time: their logits' weights are as large as a layer


# ---- slices: functions of a model of either framework, its inputs, and what is fed to it


def vision_layer(model: Any, inputs: Inputs4, fed: dict[str, Any]) -> dict[str, Any]:
    """The tower's only layer on `patches`, or for the first layer on the images; and all that follows from it alone."""
    if "patches" in fed:  # and a position embedding of zeros
        replace(model.vision, "patch_embedding", lambda image: fed["patches"])
    stages: dict[str, Any] = {}
    prefix, valid = model.embed_prefix(inputs[0], stages)
    return {
        "layer": stages["vision.layers"][0],
        "image tokens": stages["image_tokens"],
        "prefix": prefix,
        "valid": valid,
    }


def language_layer(model: Any, inputs: Inputs4, fed: dict[str, Any]) -> dict[str, Any]:
    """The only layer on `prefix` and `suffix` (for the first layer on its own), and the heads on its output.

    Of models with a sampler of actions also `cache`: the keys and values that it reads of this layer.
    """
    feed_prefix(model, fed)
    if "suffix" in fed:
        embed_suffix = model.embed_suffix
        replace(model, "embed_suffix", lambda *args: (fed["suffix"], embed_suffix(*args)[1]))
    stages: dict[str, Any] = {}
    model.compute_loss(*inputs, stages=stages)
    if model.config.family.action_tokens:  # logits and loss need all of the vocabulary
        return {name: stages[name] for name in ("prefix_layers", "pre_logits")}
    layers = model.paligemma.layers
    for block in layers if hasattr(layers, "__iter__") else [layers]:  # in JAX one Block, stacked
        replace(block, "mlp", lambda x: x)  # keys and values come before it, and its output is not read
    replace(model, "integrate", lambda observation, noise, num_steps, cache, *others: cache)
    observation, _, noise, _ = inputs
    return stages | {"cache": model.sample_actions(observation, noise)}


def sampled_actions(model: Any, inputs: Inputs4, fed: dict[str, Any], step: Any) -> dict[str, Any]:
    """The Euler steps from `cache`, each of which `step` computes in place of the model."""
    replace(model, "euler_step", step)
    observation, _, noise, _ = inputs
    return {"actions": model.integrate(observation, noise, None, fed["cache"], fed["valid"])}


def sampled_layer(model: Any, inputs: Inputs4, fed: dict[str, Any]) -> dict[str, Any]:
    """The action expert's only layer in an Euler step from x_t at `time`: on `suffix`, or for the first layer its own.

    Also x_t after the step, which holds of the last layer.
    """
    if "suffix" in fed:
        embed_suffix = model.embed_suffix
        replace(model, "embed_suffix", lambda *args: (fed["suffix"], embed_suffix(*args)[1]))
    stages: dict[str, Any] = {}
    attended = fed["cache"], fed["positions"], fed["mask"]
    num_steps = model.config.runtime.num_steps
    x_t = model.euler_step(inputs[0], fed["x_t"], fed["time"], 0.0, num_steps, *attended, stages=stages)
    return {"layer": stages["layers.0"][0], "x_t": x_t}


def vocabulary_logits(model: Any, inputs: Inputs4, fed: dict[str, Any]) -> dict[str, Any]:
    """The logits of those rows of the vocabulary that the model has."""
    length = model.config.max_token_len - 1
    return {"logits": model.paligemma.logits(fed["pre_logits"][:, -length:])}


def token_loss(model: Any, inputs: Inputs4, fed: dict[str, Any]) -> dict[str, Any]:
    """The loss of `logits`."""
    feed_prefix(model, fed)
    replace(model, "read_prefix", lambda *args: (fed["pre_logits"], None))
    replace(model.paligemma, "logits", lambda x: fed["logits"])
    return {"loss": model.compute_loss(*inputs)}


def feed_prefix(model: Any, fed: dict[str, Any]) -> None:
    """Have a model return the prefix that is fed, instead of computing it."""
    replace(model, "embed_prefix", lambda observation, stages=None: (fed["prefix"], fed["valid"]))


def replace(module: Any, name: str, value: Any) -> None:
    """Make an attribute, method or submodule of a module of either framework another one."""
    with contextlib.suppress(AttributeError):  # a method, which is the class's
        delattr(module, name)
    setattr(module, name, value)


# ---- their models


def one_layer(checkpoint: Checkpoint, config: ModelConfig, layer: int, vocabulary: dict[str, Tensor]) -> Checkpoint:
    """The checkpoint of one layer of each stack, with some rows of the vocabulary in place of all."""
    experts: dict[str, Any] = {name: dataclasses.replace(expert, depth=1) for name, expert in config.experts.items()}
    vision = dataclasses.replace(config.vision, depth=1)
    size = vocabulary["paligemma.embedding"].shape[0]
    config = dataclasses.replace(config, vision=vision, vocab_size=size, **experts)
    ours = {}
    for name, tensor in checkpoint.ours.items():
        if ".layers." in name:
            tensor = layer_of(tensor, min(layer, tensor.shape[0] - 1))  # a stack may have more than another one
        elif name in vocabulary:
            tensor = vocabulary[name]
        elif name == "vision.position_embedding" and layer:  # has been added to what is fed
            tensor = dataclasses.replace(tensor, read=np.zeros(tensor.shape, tensor.dtype).__getitem__)
        ours[name] = tensor
    return with_model(dataclasses.replace(checkpoint, ours=ours), config)


def layer_of(tensor: Tensor, layer: int) -> Tensor:
    """One layer of a stack, [1, ...]."""
    box = (slice(layer, layer + 1), *(slice(None) for _ in tensor.shape[1:]))
    return Tensor((1, *tensor.shape[1:]), tensor.dtype, lambda index: tensor.part(box)[index], anyhow=True)


def rows_of(tensor: Tensor, rows: np.ndarray) -> Tensor:
    """Some rows int [N], sorted, of a tensor [V, W], read piece by piece."""

    def read(index: Any) -> np.ndarray:
        found = []
        for piece in pieces(tensor):
            start, stop, _ = (piece[0] if piece else slice(None)).indices(tensor.shape[0])
            here = rows[(rows >= start) & (rows < stop)]
            if len(here):
                found.append(tensor.read(piece)[here - start])
        return np.concatenate(found)[index]

    return Tensor((len(rows), *tensor.shape[1:]), tensor.dtype, read)


# ---- one side in one dtype


class Run:
    """A side of a comparison in one dtype, slice by slice: NumPy in and out."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, inputs: Inputs, side: Side, num_steps: int):
        changes: dict[str, Any] = {"dtype": side.dtype, "remat": "none"}
        if side.attention is not None:
            changes["attention"] = side.attention
        if not config.family.action_tokens:
            changes["num_steps"] = num_steps
        self.config = config.with_runtime(**changes)
        self.checkpoint = with_model(checkpoint, self.config)
        self.side, self.inputs = side, inputs
        # The prompt by its places among the sorted tokens of all prompts, whose embeddings alone are read.
        prompt = inputs.observation.tokenized_prompt
        self.tokens, places = np.unique(prompt, return_inverse=True)
        places = places.reshape(prompt.shape).astype(prompt.dtype)
        self.observation = dataclasses.replace(inputs.observation, tokenized_prompt=places)
        self.vocabulary: dict[str, Tensor] = {  # read once: rows far from each other cost almost the whole table
            name: Tensor.of(rows_of(checkpoint.ours[name], self.tokens).read(()))
            for name in ("paligemma.embedding", "paligemma.output")
            if name in checkpoint.ours
        }
        self.valid = np.empty(0)  # prefix tokens, from the first slice on
        self.caches: list[Any] = []  # one for each language layer

    def vision_layer(self, layer: int, fed: dict[str, Any]) -> dict[str, Any]:
        """What a layer of the vision tower makes of what it is fed, and what follows from it alone."""
        checkpoint = one_layer(self.checkpoint, self.config, layer, self.vocabulary)
        without = ("vision.patch_embedding",) if layer else ()
        outputs = self.compute(vision_layer, checkpoint, fed, ("vision.", "paligemma.embedding"), without)
        self.valid = outputs.pop("valid")
        return outputs

    def language_layer(self, layer: int, fed: dict[str, Any]) -> dict[str, Any]:
        """What a layer of the language model makes of what it is fed; its keys and values are kept for `actions`."""
        checkpoint = one_layer(self.checkpoint, self.config, layer, self.vocabulary)
        outputs = self.compute(language_layer, checkpoint, fed | {"valid": self.valid}, without=("vision.",))
        if "cache" in outputs:
            self.caches.append(outputs.pop("cache"))
        return outputs

    def actions(self) -> np.ndarray:
        """The sampled actions [B, T, A], from the keys and values of all layers."""
        if self.side.framework == "jax":  # stacked
            cache: Any = tuple(np.concatenate(parts) for parts in zip(*self.caches, strict=True))
        else:
            cache = list(itertools.chain(*self.caches))
        fed = {"cache": cache, "valid": self.valid}
        return self.compute(sampled_actions, self.checkpoint, fed, names=(), step=self.euler_step)["actions"]

    def euler_step(
        self, x_t: np.ndarray, time: float, num_steps: int, cache: Any, positions: np.ndarray, mask: np.ndarray
    ) -> np.ndarray:
        """x_t [B, T, A] after an Euler step, of which each layer is computed by itself."""
        config = self.config.with_runtime(num_steps=num_steps)
        fed: dict[str, Any] = {"x_t": x_t, "time": np.asarray(time, np.float32), "positions": positions, "mask": mask}
        for layer in range(config.paligemma.depth):
            here = slice(layer, layer + 1)
            fed["cache"] = [x[here] for x in cache] if self.side.framework == "jax" else cache[here]
            checkpoint = one_layer(self.checkpoint, config, layer, self.vocabulary)
            outputs = self.compute(sampled_layer, checkpoint, fed, without=("vision.", "paligemma."))
            fed["suffix"] = outputs["layer"]
        return outputs["x_t"]

    def logits(self, rows: np.ndarray, fed: dict[str, Any]) -> np.ndarray:
        """The logits [B, S, N] of some rows [N] of the vocabulary, for all text tokens but the last."""
        vocabulary = {name: rows_of(self.checkpoint.ours[name], rows) for name in self.vocabulary}
        checkpoint = one_layer(self.checkpoint, self.config, 0, vocabulary)
        name = "paligemma.embedding" if self.config.tied_output else "paligemma.output"
        return self.compute(vocabulary_logits, checkpoint, fed, (name,))["logits"]

    def loss(self, fed: dict[str, Any]) -> np.ndarray:
        """The loss [B] of the tokens."""
        observation = self.inputs.observation  # the tokens are those of the whole vocabulary
        fed = fed | {"valid": self.valid}
        return self.compute(token_loss, self.checkpoint, fed, (), observation=observation)["loss"]

    def compute(
        self,
        function: Function,
        checkpoint: Checkpoint,
        fed: dict[str, Any],
        names: tuple[str, ...] = ("",),
        without: tuple[str, ...] = (),
        observation: Observation | None = None,
        step: Step | None = None,
    ) -> dict[str, Any]:
        """A function of the model with the parameters whose names begin with one of `names` and none of `without`.

        `step`, where given, is an argument of the function, which then runs without being compiled.
        """
        config = checkpoint.assets.model
        jax = self.side.framework == "jax"
        stored = checkpoint.ours if jax else checkpoint.in_layout("pi0_torch")
        params = (
            (name, widened(tensor.read(()), config))
            for name, tensor in stored.items()
            if name.startswith(names) and not name.startswith(without)
        )
        fed = mapped(lambda x: x if x.dtype.kind in "bi" else widened(x, config), fed)
        inputs = (observation or self.observation, self.inputs.actions, self.inputs.noise, self.inputs.time)
        with exact_matmuls():
            return (run_jax if jax else run_torch)(function, config, params, inputs, fed, self.side, step)


def with_model(checkpoint: Checkpoint, config: ModelConfig) -> Checkpoint:
    """The checkpoint with another model config."""
    return dataclasses.replace(checkpoint, assets=dataclasses.replace(checkpoint.assets, model=config))


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """A function of every array in dicts, lists and tuples."""
    if isinstance(tree, dict):
        return {name: mapped(function, value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(function, value) for value in tree)
    return function(tree)


@cache
def jax_slice(function: Function) -> Function:
    """The function, compiled once for all layers of a kind."""
    import jax

    return jax.jit(lambda model, inputs, fed: function(model, inputs, fed), compiler_options=XLA_OPTIONS)


def run_jax(
    function: Function,
    config: ModelConfig,
    params: Params,
    inputs: Inputs4,
    fed: dict[str, Any],
    side: Side,
    step: Step | None,
) -> dict[str, Any]:
    """A function of a model of `params`, computed in JAX as the side says; results are NumPy arrays."""
    import jax
    import jax.numpy as jnp

    from pi0_jax.loading import partial_model
    from pi0_jax.sampler import use_compilation_cache

    use_compilation_cache()
    with jax_settings(side, config.runtime.dtype == PROOF_DTYPE), jax.disable_jit(step is not None):
        model = partial_model(config, {name: jnp.asarray(value) for name, value in params})
        if step is None:
            return jax.tree.map(np.asarray, jax_slice(function)(model, inputs, fed))

        def replaced(observation: Any, x_t: Any, time: Any, scale: Any, num_steps: int, *attended: Any) -> jax.Array:
            return jnp.asarray(step(np.asarray(x_t), float(time), num_steps, *jax.tree.map(np.asarray, attended[:3])))

        return jax.tree.map(np.asarray, function(model, inputs, fed, step=replaced))


def run_torch(
    function: Function,
    config: ModelConfig,
    params: Params,
    inputs: Inputs4,
    fed: dict[str, Any],
    side: Side,
    step: Step | None,
) -> dict[str, Any]:
    """A function of a model of `params`, computed in PyTorch as the side says; results are NumPy arrays."""
    import torch

    from pi0_torch.loading import find_device, partial_model, to_device, to_numpy, to_torch

    device = find_device(side.device or "cpu")
    model = partial_model(config, {name: to_torch(value).to(device) for name, value in params})
    observation, *arrays = inputs
    here: Any = (to_device(observation, device), *(torch.from_numpy(x).to(device) for x in arrays))

    def replaced(observation: Any, x_t: Any, time: float, scale: float, num_steps: int, *attended: Any) -> torch.Tensor:
        assert step is not None
        return to_torch(step(to_numpy(x_t), time, num_steps, *mapped(to_numpy, attended[:3]))).to(device)

    with torch.no_grad():
        steps = {} if step is None else {"step": replaced}
        return mapped(to_numpy, function(model, here, mapped(lambda x: to_torch(x).to(device), fed), **steps))


# ---- the comparison


def slices(
    checkpoints: Sequence[Checkpoint],
    config: ModelConfig,
    inputs: Inputs,
    sides: Sequence[Side],
    num_steps: int,
    progress: Callable[[str], None],
) -> Iterator[Four]:
    """The stages of one slice after the other, of both sides in float64 and of both in their dtypes."""
    each = [side.proof for side in sides] + list(sides)
    runs = [Run(c, config, inputs, side, num_steps) for side, c in zip(each, [*checkpoints, *checkpoints], strict=True)]

    def results(stages: Sequence[dict[str, np.ndarray]]) -> Four:
        return tuple(Results(s, {}) for s in stages)  # type: ignore[return-value]

    def run(function: Callable[[Run], Any], name: str) -> list[Any]:
        outputs = []
        for side in runs:
            progress(f"{name}: {side.side}")
            outputs.append(function(side))
        return outputs

    fed: dict[str, Any] = {}
    for layer in range(config.vision.depth):
        name = f"vision layer {layer}"
        outputs = run(lambda r, i=layer, fed=fed: r.vision_layer(i, fed), name)  # type: ignore[misc]
        fed = {"patches": outputs[2]["layer"]}
        last = layer == config.vision.depth - 1
        yield results([vision_stages(out, r, name, last) for out, r in zip(outputs, runs, strict=True)])
    fed = {"prefix": outputs[2]["prefix"]}
    for layer in range(config.paligemma.depth):
        outputs = run(lambda r, i=layer, fed=fed: r.language_layer(i, fed), f"layer {layer}")  # type: ignore[misc]
        fed = {"prefix": padded(outputs[2]["prefix_layers"][0], config.prefix_len)}
        if "suffix_layers" in outputs[2]:
            fed["suffix"] = outputs[2]["suffix_layers"][0]
        yield results([language_stages(out, r, layer) for out, r in zip(outputs, runs, strict=True)])
    if not config.family.action_tokens:
        yield results([{"actions": actions} for actions in run(Run.actions, "actions")])
        return
    fed = {"pre_logits": outputs[2]["pre_logits"]}
    recorded = []
    for start in range(0, config.vocab_size, ROWS):
        rows = np.arange(start, min(start + ROWS, config.vocab_size))
        name = "logits" if len(rows) == config.vocab_size else f"logits from {start} on"
        outputs = run(lambda r, rows=rows, fed=fed: r.logits(rows, fed), name)  # type: ignore[misc]
        recorded.append(outputs[2])
        yield results([{name: x[valid_text(r, x.shape[1])]} for x, r in zip(outputs, runs, strict=True)])
    fed["logits"] = np.concatenate(recorded, axis=-1)
    fed["prefix"] = padded(fed["pre_logits"], config.prefix_len)
    yield results([{"loss": loss} for loss in run(lambda r: r.loss(fed), "loss")])


def left_out(config: ModelConfig, subtasks: bool) -> tuple[str, ...]:
    """What slices do not compare: it needs all weights at once. Of `subtasks` actions are those without one."""
    if config.family.action_tokens:
        return ("gradients", "first logits", "decoded logits", "tokens")
    texts = ("text loss", "fast loss", "flow loss", "first logits", "subtask logits", "subtask") if subtasks else ()
    return ("gradients", *texts)


def vision_stages(outputs: dict[str, Any], run: Run, name: str, last: bool) -> dict[str, np.ndarray]:
    """What a layer [B, S, W] of the vision tower is compared by; the last one, by the tokens that follow too."""
    stages = {name: outputs["layer"]}
    if last:
        valid = predicting(run)
        tokens = outputs["prefix"][:, : valid.shape[1]][valid]
        stages |= {"image tokens": outputs["image tokens"], "prefix tokens": tokens}
    return stages


def language_stages(outputs: dict[str, Any], run: Run, layer: int) -> dict[str, np.ndarray]:
    """As the whole comparison names them; of the prefix only unmasked tokens [N, W]."""
    valid, last = predicting(run), layer == run.config.paligemma.depth - 1
    stages = {"suffix tokens": outputs["suffix_tokens"]} if "suffix_tokens" in outputs and layer == 0 else {}
    stages[f"prefix layer {layer}"] = outputs["prefix_layers"][0][valid]
    if "suffix_layers" in outputs:
        stages[f"suffix layer {layer}"] = outputs["suffix_layers"][0]
    if last and "pre_logits" in outputs:
        stages["pre-logits"] = outputs["pre_logits"][valid]
    elif last:
        stages["prefix out"] = outputs["prefix_out"][valid]
        stages |= {name: outputs[name.replace(" ", "_")] for name in ("suffix out", "velocity", "loss")}
    return stages


def predicting(run: Run) -> np.ndarray:
    """The unmasked prefix tokens bool [B, S]: of π0-FAST without the last one, which predicts nothing."""
    return run.valid[:, : run.config.prefix_len - run.config.family.action_tokens]


def valid_text(run: Run, length: int) -> np.ndarray:
    """The tokens of the prompt that are none of padding, bool [B, `length`]."""
    return predicting(run)[:, -length:]


def padded(x: np.ndarray, length: int) -> np.ndarray:
    """Rows of zeros at the end of [B, S, W], up to S = `length`."""
    return np.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))
