"""Quantized weights of a sampler, in place of its own: `quantize`; and the same numbers in a plain model: `simulate`.

What a layer is and which formats there are, `pi0.quantization` says. Scales are float32 and symmetric: a weight is its
whole number, or float8 value, times its scale. Products of weights alone are made in the sampler's dtype and scaled
afterwards, which is exact, for int8 and float8 fit into bfloat16; those of int4 have the weights multiplied out.

Axes: O outputs, I inputs, G groups of inputs, M rows, V vocabulary, W width.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from pi0.quantization import LOOKED_UP, WIDE, QuantizationConfig
from pi0_torch.loading import Model
from pi0_torch.models.layers import Linear

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}
INT4 = 7
# The layers of a transformer: the sampler's names, and the model's.
PARTS = {"qkv": "attention.qkv", "out": "attention.out", "gate_up": "mlp.gate_up", "up": "mlp.up", "down": "mlp.down"}
SHRINK = [1 - i / 40 for i in range(15)]  # what of the largest value an int4 scale covers: the best of these is taken
MULTIPLE = 16  # of sizes, and rows at least, that products in int8 and float8 take on GPUs


class ChannelWeight(nn.Module):
    """Weights [O, I] as int8, float8 or bfloat16, with a scale [O] but for the last: multiplied in `dtype`."""

    def __init__(self, values: Num[Tensor, "O I"], scale: Float[Tensor, " O"] | None, dtype: torch.dtype):
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=False)
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self.dtype = dtype

    def forward(self, x: Float[Tensor, "... I"], bias: Tensor | None = None) -> Float[Tensor, "... O"]:
        """x·weightᵀ (+ bias [O])."""
        y = F.linear(x.to(self.dtype), self.values.to(self.dtype))
        return scaled(y, self.scale, bias).to(self.dtype)

    def rows(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "... I"]:
        """The weights of some outputs, float32."""
        rows = F.embedding(indices, self.values).float()
        return rows if self.scale is None else rows * F.embedding(indices, self.scale[:, None])

    def whole(self) -> Float[Tensor, "O I"]:
        """All weights, float32."""
        return self.rows(torch.arange(len(self.values), device=self.values.device))


class GroupWeight(nn.Module):
    """Weights [O, I] as int4, two in a byte, with a scale [O, G] for each group of inputs: multiplied in `dtype`."""

    def __init__(self, values: Int[Tensor, "O G group"], scale: Float[Tensor, "O G"], inputs: int, dtype: torch.dtype):
        super().__init__()
        first, second = (values.flatten(1) + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
        self.values = nn.Parameter(first + 16 * second, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.inputs, self.dtype = inputs, dtype

    def forward(self, x: Float[Tensor, "... I"], bias: Tensor | None = None) -> Float[Tensor, "... O"]:
        """x·weightᵀ (+ bias [O])."""
        return F.linear(x.to(self.dtype), self._unpacked(self.values, self.scale).to(self.dtype), bias)

    def rows(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "... I"]:
        """The weights of some outputs, float32."""
        return self._unpacked(F.embedding(indices, self.values), F.embedding(indices, self.scale))

    def whole(self) -> Float[Tensor, "O I"]:
        """All weights, float32."""
        return self._unpacked(self.values, self.scale)

    def _unpacked(self, values: Tensor, scale: Tensor) -> Tensor:
        both = values.float()  # in numbers that every runtime has: some have no operations on bytes
        second = (both / 16).floor()
        whole = torch.stack([both - 16 * second, second], dim=-1) - 8
        return (whole.reshape(*scale.shape, -1) * scale[..., None]).flatten(-2)[..., : self.inputs]


class RoundedProduct(nn.Module):
    """Inputs and weights [O, I] in int8 or float8, multiplied in these; inputs beyond the calibrated range are cut."""

    def __init__(self, weight: ChannelWeight, input_range: float):
        super().__init__()
        values, scale = weight.values.detach(), weight.scale
        assert scale is not None
        self.columns, rows = -values.shape[1] % MULTIPLE, -len(values) % MULTIPLE  # of zeros
        padded = F.pad(values.view(torch.uint8), (0, self.columns, 0, rows)).view(values.dtype)
        self.values = nn.Parameter(padded, requires_grad=False)
        self.input_scale = input_range / LARGEST[values.dtype]
        self.scale = nn.Parameter(scale.detach() * self.input_scale, requires_grad=False)
        self.dtype = weight.dtype

    def forward(self, x: Float[Tensor, "... I"], bias: Tensor | None = None) -> Float[Tensor, "... O"]:
        """x·weightᵀ (+ bias [O])."""
        rounded = round_inputs(x, self.input_scale, self.values.dtype).flatten(0, -2)
        count = rounded.shape[0]
        rows = max(0, 2 * MULTIPLE - count) if x.device.type == "cuda" else 0
        rounded = F.pad(rounded, (0, self.columns, 0, rows)).to(self.values.dtype)
        if self.values.dtype == torch.int8:
            y = torch._int_mm(rounded, self.values.t())
        else:
            one = torch.ones((), device=x.device)
            y = torch._scaled_mm(rounded, self.values.t(), one, one, out_dtype=torch.bfloat16)
        y = y[:count, : len(self.scale)].float().reshape(*x.shape[:-1], -1)
        return scaled(y, self.scale, bias).to(self.dtype)


Weight = Tensor | ChannelWeight | GroupWeight | RoundedProduct


def rows(weight: Weight, indices: Int[Tensor, "..."]) -> Float[Tensor, "... W"]:
    """The rows of a vocabulary's weights [V, W], or of quantized ones; TypeError for those with rounded inputs."""
    if isinstance(weight, RoundedProduct):
        raise TypeError("a vocabulary has no inputs to round")
    return F.embedding(indices, weight) if isinstance(weight, Tensor) else weight.rows(indices)


def wider_linear(x: Float[Tensor, "... W"], weight: Weight) -> Float[Tensor, "... V"]:
    """x·weightᵀ in the wider dtype of the two."""
    if not isinstance(weight, Tensor):
        return weight(x)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return F.linear(x.to(dtype), weight.to(dtype))


def scaled(y: Tensor, scale: Float[Tensor, " O"] | None, bias: Tensor | None) -> Tensor:
    """y [..., O]·scale + bias [O], where there are these."""
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def round_inputs(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """x / scale in float32, of any shape, cut to the range of `dtype`, int8 or float8, and rounded to it."""
    x = (x.float() / scale).clamp(-LARGEST[dtype], LARGEST[dtype])
    return x.round() if dtype == torch.int8 else x.to(dtype).float()


def check_formats(formats: Iterable[str], device: torch.device) -> None:
    """Raise ValueError for a format that a device cannot multiply in."""
    if "w8a8_float8" not in formats:
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        raise ValueError(
            f"w8a8_float8 multiplies in float8, which {name} does not; use w8a8, or float8, which rounds weights alone"
        )


def make_weight(
    weight: Float[Tensor, "O I"], format: str, dtype: torch.dtype, group_size: int
) -> ChannelWeight | GroupWeight:
    """Weights rounded to a format of `pi0.quantization.FORMATS` but "wide"; inputs are not rounded here."""
    if format == "bfloat16":
        return ChannelWeight(weight.to(torch.bfloat16), None, dtype)
    if format == "int4":
        grouped = F.pad(weight.float(), (0, -weight.shape[1] % group_size)).unflatten(1, (-1, group_size))
        return GroupWeight(*round_groups(grouped), weight.shape[1], dtype)
    kept = torch.float8_e4m3fn if "float8" in format else torch.int8
    scale = nonzero(weight.float().abs().amax(dim=1)) / LARGEST[kept]
    values = weight.float() / scale[:, None]
    return ChannelWeight((values.round() if kept == torch.int8 else values).to(kept), scale, dtype)


def round_groups(weight: Float[Tensor, "O G group"]) -> tuple[Int[Tensor, "O G group"], Float[Tensor, "O G"]]:
    """int4 values and their scales: of those that cover SHRINK of the largest value, that of the least square error."""
    best: Any = None
    whole = nonzero(weight.abs().amax(dim=-1)) / INT4
    for share in SHRINK:
        scale = whole * share
        values = (weight / scale[..., None]).round().clamp(-INT4 - 1, INT4)
        error = (values * scale[..., None] - weight).square().sum(dim=-1)
        if best is None:
            best = values, scale, error
        better = error < best[2]
        best = (
            torch.where(better[..., None], values, best[0]),
            torch.where(better, scale, best[1]),
            torch.where(better, error, best[2]),
        )
    return best[0].to(torch.int8), best[1]


def nonzero(scale: Tensor) -> Tensor:
    """A scale of any shape, 1 in place of 0."""
    return torch.where(scale > 0, scale, 1.0)


def sampler_layers(weights: Any) -> dict[str, nn.ParameterList]:
    """Where the layers of a sampler's `weights` are, by name: lists of a weight [O, I], which comes first."""
    vision = weights["vision"]
    found = {"vision.patch_embedding": vision["patches"]}
    towers = {"vision": vision["layers"], "paligemma": weights["prefix"]}
    towers |= {"action_expert": weights["suffix"]} if "suffix" in weights else {}
    for tower, layers in towers.items():
        for i, layer in enumerate(layers):
            parts = (part for part in layer if part in PARTS)
            found |= {f"{tower}.layers.{i}.{PARTS[part]}": layer[part] for part in parts}
        found |= {"vision.head": vision["head"]} if tower == "vision" else {}
    found["paligemma.embedding"] = weights["embedding"]
    others = {"output": "paligemma.output", "state": "state_proj", "action_mix": "action_time_mlp_out"}
    others |= {"action_out": "action_out_proj"}
    return found | {name: weights[part] for part, name in others.items() if part in weights}


def model_layers(model: Model) -> dict[str, list[nn.Module]]:
    """The modules of a plain model that `sampler_layers` has as one layer, by its name."""
    found: dict[str, list[nn.Module]] = {"vision.patch_embedding": [model.vision.patch_embedding]}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            fused = re.sub(r"attention\.(query|key|value)$", "attention.qkv", name)
            fused = re.sub(r"^(?!vision)(.*)mlp\.(gate|up)$", r"\1mlp.gate_up", fused)
            found.setdefault(fused, []).append(module)
    return found


def quantize(sampler: Any, config: QuantizationConfig) -> dict[str, str]:
    """Round the weights of a `Sampler` as `config` says, in place; returns the format of each layer.

    Its programs are made anew: warm it up afterwards. Raises ConfigError for patterns and ranges that fit no layer,
    and ValueError, before anything is changed, for layers that are rounded already, for products in float8 where the
    device has none, and for rounded inputs in a sampler with guided real-time chunking, which needs their gradient.
    """
    layers = sampler_layers(sampler.weights)
    formats = config.formats(layers)
    if again := [name for name, layer in layers.items() if not isinstance(layer[0], Tensor)]:
        raise ValueError(f"the sampler is quantized already: {again[0]} and {len(again) - 1} more layers")
    rounded = {name: format for name, format in formats.items() if format.startswith("w8a8")}
    if rounded and sampler.rtc is not None and sampler.rtc.method == "guided":
        name, format = next(iter(rounded.items()))
        raise ValueError(f"{name} is {format}, and rounded inputs have no gradient, which rtc='guided' needs")
    check_formats(formats.values(), sampler.device)
    compute = getattr(torch, sampler.config.runtime.dtype)
    for name, format in formats.items():
        if format != WIDE:
            put(layers[name], replacement(name, layers[name][0].detach(), format, config, compute))
    sampler._make_programs()
    return formats


def put(layer: nn.ParameterList, weight: Weight) -> None:
    """Make `weight` that of a layer of `sampler_layers`."""
    delattr(layer, "0")  # a parameter's place takes no module
    setattr(layer, "0", weight)


def replacement(
    name: str, weight: Float[Tensor, "O I"], format: str, config: QuantizationConfig, compute: torch.dtype
) -> ChannelWeight | GroupWeight | RoundedProduct:
    """What takes the place of a layer's weight in a sampler that computes in `compute`."""
    dtype = torch.promote_types(compute, weight.dtype) if name in LOOKED_UP else weight.dtype
    made = make_weight(weight, format, dtype, config.group_size)
    if not format.startswith("w8a8"):
        return made
    assert isinstance(made, ChannelWeight)
    return RoundedProduct(made, config.input_ranges[name])


@torch.no_grad()
def simulate(model: Model, config: QuantizationConfig, formats: Mapping[str, str]) -> Model:
    """A copy of a plain model that computes with the numbers of the layers' `formats`, LoRA merged.

    It has every stage and the loss of a sampler that was given `config`, and is of no use for speed or memory.
    """
    model, compute = copy.deepcopy(model), getattr(torch, model.config.runtime.dtype)
    modules = model_layers(model)
    for name, format in formats.items():
        if format == WIDE:
            continue
        if name in LOOKED_UP:
            parameter = getattr(model.paligemma, name.rpartition(".")[2])
            made = make_weight(parameter, format, compute, config.group_size)
            parameter.copy_(made.whole())
            continue
        for module in modules[name]:
            round_module(module, format, config.group_size)
            if format.startswith("w8a8"):
                module.register_forward_pre_hook(input_rounding(format, config.input_ranges[name]))
    return model


def round_module(module: Any, format: str, group_size: int) -> None:
    """Round the weight of a module of `model_layers`, in the dtype and the order of axes that the sampler has."""
    if isinstance(module, Linear):
        weight = module.merged_weight().to(module.dtype)
        module.lora = None
        rounded = make_weight(weight, format, module.dtype, group_size).whole()
    else:  # patches
        flat = module.weight.permute(0, 2, 3, 1)
        whole = make_weight(flat.flatten(1), format, torch.float32, group_size).whole()
        rounded = whole.view(flat.shape).permute(0, 3, 1, 2)
    module.weight = nn.Parameter(rounded.contiguous(), requires_grad=False)


def input_rounding(format: str, input_range: float) -> Any:
    """A hook that rounds a module's input as `RoundedProduct` does."""
    dtype = torch.float8_e4m3fn if "float8" in format else torch.int8
    scale = input_range / LARGEST[dtype]
    return lambda module, args: (round_inputs(args[0], scale, dtype) * scale,)


@contextmanager
def calibration(model: Model, layers: Collection[str]) -> Iterator[dict[str, float]]:
    """Measure the inputs of what a plain model computes within the block, for `QuantizationConfig.input_ranges`.

    After the block, the dict has the largest absolute input of each of the `layers`; 1 of inputs that are all 0.
    """
    found: dict[str, float] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = max(found.get(name, 0.0), float(args[0].abs().max()))

        return keep

    modules = {name: own for name, own in model_layers(model).items() if name in layers}
    handles = [module.register_forward_pre_hook(hook(name)) for name, own in modules.items() for module in own]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    found.update({name: value or 1.0 for name, value in found.items()})


def stored_bytes(module: nn.Module) -> int:
    """The bytes of all parameters and buffers, each counted once."""
    return sum(x.numel() * x.element_size() for x in [*module.parameters(), *module.buffers()])
