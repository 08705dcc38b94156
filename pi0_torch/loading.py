"""Load a checkpoint of any layout as a PyTorch model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convert.checkpoints import Checkpoint, open_checkpoint
from convert.layouts.registry import LAYOUTS
from convert.tensors import Tensor
from pi0.config import ModelConfig, canonical_dtype
from pi0.observation import Observation
from pi0.parameters import compare_shapes
from pi0_torch.models.pi0 import Pi0
from pi0_torch.models.pi0_fast import Pi0Fast
from pi0_torch.models.pi05 import Pi05

Model = Pi0 | Pi05 | Pi0Fast
MODELS: dict[str, type[Pi0] | type[Pi05] | type[Pi0Fast]] = {"pi0": Pi0, "pi05": Pi05, "pi0_fast": Pi0Fast}


def load(
    path: str | Path,
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    config: ModelConfig | None = None,
    device: str | torch.device = "cpu",
) -> Model:
    """The model of a checkpoint that `pi0-convert` wrote, or of any layout it reads; `gs://` and `hf://` too.

    `dtype` is the compute dtype (default: the config's), `param_dtype` the dtype parameters are kept in (default: as
    stored), both by name or as a dtype of PyTorch or NumPy. `config` replaces what the checkpoint says. Raises
    ConfigError or ValueError for a dtype or device that is unknown or not available, and CheckpointError or LayoutError
    that name every tensor that is missing, unknown or of another shape.
    """
    return load_model(open_checkpoint(path, config), dtype=dtype, param_dtype=param_dtype, device=device)


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    device: str | torch.device = "cpu",
) -> Model:
    """The model of an opened checkpoint; see `load`."""
    model, device = checkpoint.assets.model, find_device(device)
    if dtype is not None:
        model = model.with_runtime(dtype=dtype)
    kept = None if param_dtype is None else getattr(torch, canonical_dtype(param_dtype, "param_dtype"))
    params = {
        name: to_torch(tensor.read(())).to(device, kept) for name, tensor in checkpoint.in_layout("pi0_torch").items()
    }
    return with_parameters(model, params)


def find_device(device: Any) -> torch.device:
    """The device of this name. Raises ValueError for one that is unknown or not available."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device is {device!r}: {str(error).partition(chr(10))[0]}") from error
    return found


def make_model(config: ModelConfig) -> Model:
    """A model of the config's family, newly initialized."""
    return MODELS[config.kind](config)


def abstract_model(config: ModelConfig) -> Model:
    """The model without weights: every parameter is on the meta device.

    Models scale their initial values in place: out of place, the meta device would import Triton and torch._dynamo.
    """
    with torch.device("meta"):
        return make_model(config)


def with_parameters(config: ModelConfig, params: Mapping[str, torch.Tensor]) -> Model:
    """The model with `params`, of any shape, by its parameters' names.

    Raises LayoutError unless exactly all are given.
    """
    model = abstract_model(config)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    compare_shapes(expected, {name: tuple(p.shape) for name, p in params.items()}, "the model's parameters")
    model.load_state_dict(dict(params), assign=True)
    return model


def partial_model(config: ModelConfig, params: Mapping[str, torch.Tensor]) -> Model:
    """The model with `params` alone, by its parameters' names: where it needs another one it raises AttributeError.

    Raises LayoutError for a parameter that the model has not. `params` are of any shape.
    """
    model = copy.deepcopy(_abstract_model(config))
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    wanted = {name: shape for name, shape in expected.items() if name in params}
    compare_shapes(wanted, {name: tuple(p.shape) for name, p in params.items()}, "the model's parameters")
    for name in expected.keys() - params.keys():
        *path, leaf = name.split(".")
        delattr(reduce(getattr, path, model), leaf)
    model.load_state_dict(dict(params), assign=True)
    return model


_abstract_model = cache(abstract_model)


def parameters_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    """PyTorch tensors of any shape (a state dict, or gradients) as tensors that `convert.layouts` reads."""
    return {name: Tensor.of(to_numpy(tensor)) for name, tensor in tensors.items()}


def to_device(observation: Observation, device: str | torch.device = "cpu") -> Observation:
    """A NumPy observation as PyTorch tensors on `device`."""
    return map_tensors(lambda value: torch.as_tensor(value).to(device), observation)


def map_tensors(function: Callable[[Any], Any], tree: Any) -> Any:
    """`function` of every array or tensor of nested observations, dicts and tuples; None stays."""
    if tree is None:
        return None
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {f.name: map_tensors(function, getattr(tree, f.name)) for f in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **fields)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        items = [map_tensors(function, value) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return function(tree)


def our_names(config: ModelConfig) -> dict[str, str]:
    """The name in `pi0.parameters` of each of the model's parameters; those of all layers are one there."""
    return LAYOUTS["pi0_torch"].origins(config)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A NumPy array of any shape as a tensor of its own; bfloat16 by its bytes."""
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor of any shape as a NumPy array; bfloat16 by its bytes."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
