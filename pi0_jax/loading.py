"""Load a checkpoint of any layout as a JAX model."""

from __future__ import annotations

from functools import cache, reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from convert.checkpoints import Checkpoint, open_checkpoint
from pi0.config import PROOF_DTYPE, ConfigError, ModelConfig, canonical_dtype
from pi0.parameters import compare_shapes, flatten, unflatten
from pi0_jax.models.pi0 import Pi0
from pi0_jax.models.pi0_fast import Pi0Fast
from pi0_jax.models.pi05 import Pi05

Model = Pi0 | Pi05 | Pi0Fast
MODELS: dict[str, type[Pi0] | type[Pi05] | type[Pi0Fast]] = {"pi0": Pi0, "pi05": Pi05, "pi0_fast": Pi0Fast}


def load(path: str | Path, *, dtype: Any = None, param_dtype: Any = None, config: ModelConfig | None = None) -> Model:
    """The model of a checkpoint: ours, or an openpi `params` folder of either style; `gs://` and `hf://` too.

    `dtype` is the compute dtype (default: the config's), `param_dtype` the dtype parameters are kept in (default: as
    stored), both by name or as a dtype of JAX or NumPy. `config` replaces what the checkpoint says. Raises ConfigError
    for an unknown dtype, and CheckpointError or LayoutError that name every tensor that is missing, unknown or of
    another shape.
    """
    return load_model(open_checkpoint(path, config), dtype=dtype, param_dtype=param_dtype)


def load_model(
    checkpoint: Checkpoint, *, dtype: Any = None, param_dtype: Any = None, attention: str | None = None
) -> Model:
    """The model of an opened checkpoint; see `load`. `attention` as in `RuntimeConfig` (default: the config's)."""
    runtime = {"dtype": dtype, "attention": attention}
    model = checkpoint.assets.model.with_runtime(**{k: v for k, v in runtime.items() if v is not None})
    kept = None if param_dtype is None else canonical_dtype(param_dtype, "param_dtype")
    params = {
        name: jnp.asarray(tensor.read(()), dtype=kept or tensor.dtype) for name, tensor in checkpoint.ours.items()
    }
    return with_parameters(model, params)


def make_model(config: ModelConfig, *, rngs: nnx.Rngs) -> Model:
    """A model of the config's family, newly initialized. Raises ConfigError for float64 where JAX has none."""
    if config.runtime.dtype == PROOF_DTYPE and not getattr(jax.config, "jax_enable_x64"):  # noqa: B009 -- of settings mypy knows none
        raise ConfigError("dtype is 'float64', which JAX computes only within jax.enable_x64(True)")
    return MODELS[config.kind](config, rngs=rngs)


def abstract_model(config: ModelConfig) -> Model:
    """The model without weights: every parameter is a `jax.ShapeDtypeStruct`."""
    return nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0)))


def with_parameters(config: ModelConfig, params: dict[str, Any]) -> Model:
    """The model with `params`, by our dotted names. Raises LayoutError unless exactly all are given."""
    expected = {name: leaf.shape for name, leaf in parameters_of(abstract_model(config)).items()}
    compare_shapes(expected, {name: value.shape for name, value in params.items()}, "the model's parameters")
    return merge(config, unflatten(params))


def partial_model(config: ModelConfig, params: dict[str, Any]) -> Model:
    """The model with `params` alone, by our dotted names: where it needs another one it raises AttributeError.

    Raises LayoutError for a parameter that the model has not.
    """
    model = nnx.merge(*_abstract_state(config))
    expected = {name: leaf.shape for name, leaf in parameters_of(model).items()}
    wanted = {name: shape for name, shape in expected.items() if name in params}
    compare_shapes(wanted, {name: value.shape for name, value in params.items()}, "the model's parameters")
    for name in expected.keys() - params.keys():
        *path, leaf = name.split(".")
        delattr(reduce(getattr, path, model), leaf)
    graphdef, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, unflatten(params))
    return nnx.merge(graphdef, state)


@cache
def _abstract_state(config: ModelConfig) -> tuple[Any, Any]:
    return nnx.split(abstract_model(config))


def merge(config: ModelConfig, params: dict[str, Any]) -> Model:
    """The model with parameters as nested dicts, which are not checked."""
    graphdef, state = nnx.split(abstract_model(config))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def parameters_of(model: Model) -> dict[str, jax.Array]:
    """A model's parameters (or a gradient's), of any shape, by our dotted names."""
    return flatten(nnx.to_pure_dict(nnx.state(model)))
